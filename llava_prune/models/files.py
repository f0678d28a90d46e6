"""Read the files of a checkpoint: safetensors, or torch.load(weights_only=True), so that no pickled code is run."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
POINTER = b"version https://git-lfs"
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Config entries that name the attention backend."""
ADAPTER, PROJECTOR = "adapter_config.json", "mm_projector.bin"
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Pairs of a single weight file and the index of several files. The first that exists is read, as in transformers."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: if the file cannot be read, is not valid JSON or does not hold one object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected one JSON object, found a {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def refuse_pointers(folder: Path) -> None:
    """Refuse a clone that has Git LFS pointers instead of its files.

    Raises:
        ValueError: with the first pointer file.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".model", ".json", ".safetensors", ".bin") and file.is_file() and file.stat().st_size < 1024:
            with open(file, "rb") as handle:
                if handle.read(len(POINTER)) == POINTER:
                    raise ValueError(f"{file} is a Git LFS pointer and not the file; run `git lfs pull` in {folder}")


def load_tokenizer(folder: Path, original: bool) -> Any:
    """Load the checkpoint's tokenizer; None if it has no tokenizer files.

    Args:
        folder: the checkpoint.
        original: whether it is in LLaVA's format, in which tokenizers are Llama's for every `model_type`.

    Raises:
        ValueError: for broken tokenizer files.
    """
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        return None
    for path in found:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; fetch it again")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    from transformers import AutoTokenizer, LlamaConfig

    config = {"config": LlamaConfig()} if original else {}
    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=False, trust_remote_code=False, **config)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizer libraries raise their own errors, and those in Rust may panic
        if "custom code" in str(error):
            raise ValueError(
                f"{folder}: the tokenizer needs code of its own (auto_map in tokenizer_config.json), which is not run"
            ) from error
        refuse_protobuf_clash(folder)
        names = ", ".join(path.name for path in found)
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{folder}: the tokenizer ({names}) cannot be read ({detail}); fetch it again") from error


def refuse_protobuf_clash(folder: Path) -> None:
    """Raise a clear error if a tokenizer cannot be read because protobuf and sentencepiece are incompatible.

    Otherwise transformers tries other formats, whose errors do not mention the cause.

    Raises:
        ValueError: if the two packages are incompatible.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except Exception as error:  # protobuf raises its own class of error
        detail = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{folder}: the tokenizer cannot be read, because the installed sentencepiece and protobuf do not go "
            f"together ({detail}); upgrade protobuf, or pip install 'sentencepiece<0.2.3'"
        ) from error


def shards(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint: safetensors before others, a single file before an index of several.

    Raises:
        ValueError: if there are none, or for an index that is broken, points outside the folder or lists a missing
            file.
    """
    listed = {index: _listed(folder, index) for _, index in WEIGHTS if (folder / index).is_file()}
    if (folder / ADAPTER).is_file() and not is_adapter(folder):
        raise ValueError(
            f"{folder}: an adapter ({ADAPTER}) beside the weights of a whole model, which transformers would add and "
            "package llava would not; move one of them to a folder of its own"
        )
    for single, index in WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        if index in listed:
            return listed[index]
    if is_adapter(folder):
        raise ValueError(
            f"{folder}: an adapter, without the weights of its base model; give the checkpoint that it was trained on "
            "as model_base (--model-base)"
        )
    raise ValueError(f"{folder}: no weights (model*.safetensors or pytorch_model*.bin)")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has a LoRA adapter or a projector, and no weights of a complete model."""
    if any((folder / name).is_file() for names in WEIGHTS for name in names):
        return False
    return any((folder / name).is_file() for name in (ADAPTER, PROJECTOR))


def _listed(folder: Path, index: str) -> list[Path]:
    """Return the files that an index lists."""
    table = read_json(folder / index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{folder / index}: expected a weight_map of tensors and files; fetch the file again")
    for value in table.values():
        plain = isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\\" not in value
        if not plain or (folder / value).is_dir():
            raise ValueError(f"{folder / index}: {value!r} in weight_map is not the name of a file in this folder")
    names = sorted(set(table.values()))
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(names)} weight files missing, first {missing[0]}")
    return [folder / n for n in names]


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all (name, tensor) of a checkpoint, with one shard in memory at a time.

    Raises:
        ValueError: for a file that is truncated or not a weight file.
    """
    for file in shards(folder):
        yield from tensors_of(file)


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all (name, tensor) of a weight file.

    Raises:
        ValueError: for a file that is truncated, is not a weight file, or holds more than tensors.
    """
    with _reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    yield name, handle.get_tensor(name)
            return
        zipped = zipfile.is_zipfile(file)  # files in the older format cannot be memory-mapped
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{file}: {MORE}")
    yield from found.items()


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a checkpoint.

    Raises:
        ValueError: for a tensor of integers other than position ids; the model needs floating-point weights.
    """
    out: dict[str, tuple[int, ...]] = {}
    for file in shards(folder):
        if file.suffix == ".safetensors":
            with _reading(file), safe_open(file, framework="pt") as handle:
                heads = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                found = {name: (str(h.get_dtype()), tuple(h.get_shape())) for name, h in heads.items()}
            integers = [n for n, (kind, _) in found.items() if not kind.startswith(("F", "BF"))]
            out |= {name: shape for name, (_, shape) in found.items()}
        else:
            stored = dict(tensors_of(file))
            integers = [name for name, value in stored.items() if not value.is_floating_point()]
            out |= {name: tuple(value.shape) for name, value in stored.items()}
        refuse_integers(integers, file)
    return out


def refuse_integers(names: Iterable[str], file: Path) -> None:
    """Refuse tensors of integers in a weight file, except position ids.

    Raises:
        ValueError: with the first such tensor.
    """
    found = [n for n in names if not n.endswith("position_ids")]
    if found:
        raise ValueError(f"{file}: {found[0]} holds integers, and the model has floating-point weights there")


MORE = "holds more than tensors, so it is not loaded; save the state dict alone"


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of weight file readers into a ValueError with a message of one line."""
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file}: truncated or no weight file ({' '.join(str(error).split())[:200]})") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(f"{file}: {MORE}") from error


def tower_folder(folders: list[Path], name: str) -> str:
    """Locate a vision tower: a folder inside a checkpoint if `name` exists there, else `name` itself.

    Args:
        folders: the checkpoint and its base.
        name: a folder inside a checkpoint, another folder, or a hub id.

    Raises:
        ValueError: for a path that does not exist.
    """
    relative = not Path(name).is_absolute() and ".." not in Path(name).parts and name not in ("", ".")
    for inside in (folder / name for folder in folders if relative):
        if inside.is_dir():
            refuse_pointers(inside)
            return str(inside.resolve())
    if Path(name).is_dir():
        refuse_pointers(Path(name))
        return name
    if name.count("/") == 1 and ".." not in name:
        return name
    raise ValueError(f"vision tower {name!r} is neither a folder inside {folders[0]} nor a hub id")


def processor_class() -> Any:
    """Return the class of CLIP's image processor that uses Pillow, with which LLaVA was trained."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def clip_processor(settings: dict[str, Any]) -> Any:
    """Build CLIP's image processor with the settings of a checkpoint in transformers' format."""
    return processor_class().from_dict({k: v for k, v in settings.items() if not k.endswith("_type")})


def image_processor(source: str) -> Any:
    """Load the image processor of a tower from a folder or hub id.

    Raises:
        ValueError: for a broken preprocessor_config.json.
    """
    if (Path(source) / PROCESSOR).is_file():
        read_json(Path(source) / PROCESSOR)
    return processor_class().from_pretrained(source)
