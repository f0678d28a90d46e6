"""Read the files of a checkpoint. Nothing here unpickles code: safetensors, or torch.load(weights_only=True)."""

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
"""Entries of a config that name the attention backend."""
ADAPTER, PROJECTOR = "adapter_config.json", "mm_projector.bin"
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""A single weight file, and the index of several; the first that is there is read, as in transformers."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: for anything else.
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
    """Refuse a clone that has Git LFS pointers in place of its files.

    Raises:
        ValueError: naming the first of them.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".model", ".json", ".safetensors", ".bin") and file.is_file() and file.stat().st_size < 1024:
            with open(file, "rb") as handle:
                if handle.read(len(POINTER)) == POINTER:
                    raise ValueError(f"{file} is a Git LFS pointer and not the file; run `git lfs pull` in {folder}")


def load_tokenizer(folder: Path, original: bool) -> Any:
    """The checkpoint's tokenizer, or None when it has no tokenizer files.

    Args:
        folder: the checkpoint.
        original: whether it is in LLaVA's format, whose tokenizers are Llama's under any `model_type`.

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
    except BaseException as error:  # tokenizer libraries raise errors of their own, and those in Rust panic
        if "custom code" in str(error):
            raise ValueError(
                f"{folder}: the tokenizer needs code of its own (auto_map in tokenizer_config.json), which is not run"
            ) from error
        refuse_protobuf_clash(folder)
        names = ", ".join(path.name for path in found)
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{folder}: the tokenizer ({names}) cannot be read ({detail}); fetch it again") from error


def refuse_protobuf_clash(folder: Path) -> None:
    """Explain a tokenizer that cannot be read because of the packages protobuf and sentencepiece, where they clash.

    transformers then tries other formats, and their errors say nothing of the cause.

    Raises:
        ValueError: naming both packages.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except Exception as error:  # protobuf has a class of its own for it
        detail = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{folder}: the tokenizer cannot be read, because the installed sentencepiece and protobuf do not go "
            f"together ({detail}); upgrade protobuf, or pip install 'sentencepiece<0.2.3'"
        ) from error


def shards(folder: Path) -> list[Path]:
    """Weight files of a checkpoint, safetensors first, a single file before the index of several.

    Raises:
        ValueError: when there are none, or for an index that is broken, points outside the folder or names a missing
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
    """Whether a folder has a LoRA adapter or a projector, and no weights of a whole model."""
    if any((folder / name).is_file() for names in WEIGHTS for name in names):
        return False
    return any((folder / name).is_file() for name in (ADAPTER, PROJECTOR))


def _listed(folder: Path, index: str) -> list[Path]:
    """Files that an index names."""
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
    """All (name, tensor) of a checkpoint, one shard in memory at a time.

    Raises:
        ValueError: for a file that is cut off or no weight file.
    """
    for file in shards(folder):
        yield from tensors_of(file)


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor) of a weight file.

    Raises:
        ValueError: for a file that is cut off, is not a weight file, or holds more than tensors.
    """
    with _reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    yield name, handle.get_tensor(name)
            return
        zipped = zipfile.is_zipfile(file)  # older files cannot be mapped
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{file}: {MORE}")
    yield from found.items()


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, which are floating-point numbers.

    Raises:
        ValueError: naming file and tensor for integers, which would be taken for weights.
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
    """Refuse tensors of a weight file that hold integers, except position numbers.

    Raises:
        ValueError: naming the first of them.
    """
    found = [n for n in names if not n.endswith("position_ids")]
    if found:
        raise ValueError(f"{file}: {found[0]} holds integers, and the model has floating-point weights there")


MORE = "holds more than tensors, so it is not loaded; save the state dict alone"


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """One line for what the readers of weight files raise."""
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file}: truncated or no weight file ({' '.join(str(error).split())[:200]})") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(f"{file}: {MORE}") from error


def tower_folder(folders: list[Path], name: str) -> str:
    """Where a vision tower is: inside a checkpoint when `name` is a folder there, else `name` itself.

    Args:
        folders: the checkpoint, and its base.
        name: a name inside a checkpoint, a folder, or a hub id.

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
    """CLIP's image processor on Pillow: the one whose pixels LLaVA was trained on."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def clip_processor(settings: dict[str, Any]) -> Any:
    """CLIP's image processor with the settings of a checkpoint in transformers' format."""
    return processor_class().from_dict({k: v for k, v in settings.items() if not k.endswith("_type")})


def image_processor(source: str) -> Any:
    """The processor of a tower's folder or hub id.

    Raises:
        ValueError: for a broken preprocessor_config.json.
    """
    if (Path(source) / PROCESSOR).is_file():
        read_json(Path(source) / PROCESSOR)
    return processor_class().from_pretrained(source)
