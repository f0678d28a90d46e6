"""Read the files of a checkpoint. Nothing here unpickles code: safetensors, or torch.load(weights_only=True)."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
POINTER = b"version https://git-lfs"


def refuse_pointers(folder: Path) -> None:
    """Refuse a clone that has Git LFS pointers in place of its files.

    Raises:
        ValueError: naming the first of them.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".model", ".json", ".safetensors", ".bin") and file.stat().st_size < 1024:
            with open(file, "rb") as handle:
                if handle.read(len(POINTER)) == POINTER:
                    raise ValueError(f"{file} is a Git LFS pointer and not the file; run `git lfs pull` in {folder}")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None when it has no tokenizer files."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), use_fast=False)


def shards(folder: Path) -> list[Path]:
    """Weight files of a checkpoint, safetensors first.

    Raises:
        ValueError: when there are none, or an index names a missing one.
    """
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [n for n in names if not (folder / n).is_file()]
            if missing:
                raise ValueError(f"{folder}: {len(missing)} of {len(names)} weight files missing, first {missing[0]}")
            return [folder / n for n in names]
        if (folder / single).is_file():
            return [folder / single]
    if (folder / "adapter_config.json").is_file() or (folder / "mm_projector.bin").is_file():
        raise ValueError(
            f"{folder}: an adapter, without the weights of its base model; merge the two into one checkpoint first "
            "(LLaVA's scripts/merge_lora_weights.py does), or give --model-base to a program of llava-prune run"
        )
    raise ValueError(f"{folder}: no weights (model*.safetensors or pytorch_model*.bin)")


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor) of a checkpoint, one shard in memory at a time.

    Raises:
        ValueError: for a file that is cut off or no weight file.
    """
    from safetensors import SafetensorError, safe_open

    for file in shards(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118
                        yield name, handle.get_tensor(name)
            else:
                zipped = zipfile.is_zipfile(file)  # older files cannot be mapped
                yield from torch.load(file, map_location="cpu", weights_only=True, mmap=zipped).items()
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{file}: truncated or no weight file ({error})") from error
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            raise ValueError(f"{file}: holds more than tensors, so it is not loaded ({error})") from error


def tower_folder(folder: Path, name: str) -> str:
    """Where a vision tower is: inside the checkpoint when `name` is a folder there, else `name` itself.

    Raises:
        ValueError: for a path that does not exist.
    """
    inside = folder / name
    if inside.is_dir():
        return str(inside.resolve())
    if Path(name).is_dir() or name.count("/") == 1:
        return name
    raise ValueError(f"vision tower {name!r} is neither a folder inside {folder} nor a hub id")


def processor_class() -> Any:
    """CLIP's image processor on Pillow: the one whose pixels LLaVA was trained on."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def image_processor(source: str) -> Any:
    """The processor of a tower's folder or hub id."""
    return processor_class().from_pretrained(source)


def _fill(model: nn.Module, state: Iterator[tuple[str, Tensor]], dtype: torch.dtype, source: str) -> None:
    """Copy tensors into a model built on the meta device.

    Raises:
        ValueError: for tensors that are missing, of another size, or have no place in the model.
    """
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    spare, filled = [], {}
    for name, value in state:
        if name not in places:
            spare.append(name)
            continue
        if places[name].shape != value.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, the config asks for {tuple(places[name].shape)}"
            )
        filled[name] = value.to(dtype) if value.is_floating_point() else value
    missing = sorted(n for n, _ in model.named_parameters() if n not in filled)
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, first {missing[0]}")
    _refuse_spare(spare, source)
    model.load_state_dict(filled, strict=False, assign=True)


def _refuse_spare(names: Iterable[str], source: str) -> None:
    """Weights of the language model or projector that the model has no place for, as attention biases."""
    spare = sorted(n for n in names if not n.endswith(("inv_freq", "position_ids")) and "vision_tower" not in n)
    if spare:
        raise ValueError(
            f"{source}: {len(spare)} tensors have no place in a Llama language model, first {spare[0]}; this is a "
            "checkpoint of another architecture, which is not supported"
        )


def _from_pretrained(
    build: Any, folder: Path, dtype: torch.dtype, attn: str | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers' own loading, and its loading info.

    Raises:
        ValueError: for weights that are missing, truncated or of another model.
    """
    if attn is not None:
        options["attn_implementation"] = attn
    try:
        model, info = build.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError"):
            raise
        raise ValueError(f"{folder}: truncated or foreign weights ({error})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
    return model, info


def load_original(folder: Path, config: dict[str, Any], dtype: torch.dtype, attn: str | None) -> tuple[Any, Any]:
    """haotian-liu/LLaVA format into the `llava` package's class."""
    try:
        from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    except ImportError as error:
        raise ValueError(
            f"family 'llava' needs the package llava (pip install --no-deps llava-torch==1.2.2.post1): {error}"
        ) from error
    shards(folder)
    tower = tower_folder(folder, config["mm_vision_tower"])
    options = LlavaConfig.from_pretrained(str(folder))
    options.mm_vision_tower = tower
    unfrozen = getattr(options, "unfreeze_mm_vision_tower", False)
    options.unfreeze_mm_vision_tower = False  # built empty first, loaded below
    model, info = _from_pretrained(LlavaLlamaForCausalLM, folder, dtype, attn, config=options)
    _refuse_spare(info["unexpected_keys"], str(folder))
    vision = model.get_vision_tower()
    vision.load_model()
    vision.image_processor = image_processor(tower)
    vision.to(dtype=dtype)
    if unfrozen:
        _overlay(vision, folder)
    return model, vision.image_processor


def _overlay(vision: Any, folder: Path) -> None:
    """Tower weights that were trained with the model and lie in its checkpoint."""
    prefix = "model.vision_tower.vision_tower."
    own = set(vision.vision_tower.state_dict())
    state = {}
    for name, value in tensors(folder):
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            state[short if short in own else short.removeprefix("vision_model.")] = value
    if state:
        vision.vision_tower.load_state_dict(state, strict=False)
        vision.vision_tower.requires_grad_(False)


def load_converted(folder: Path, config: dict[str, Any], dtype: torch.dtype, attn: str | None) -> tuple[Any, Any]:
    """haotian-liu/LLaVA format into transformers' class; keys are renamed while reading."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    source = tower_folder(folder, config["mm_vision_tower"])
    vision = CLIPVisionConfig.from_pretrained(source)
    drop = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version")
    text = LlamaConfig(**{k: v for k, v in config.items() if k not in drop and not k.startswith("mm_")})
    text.tie_word_embeddings = False  # a checkpoint without a head gets a copy of its embeddings
    image_id = config["vocab_size"]  # one past the vocabulary: logits keep their width
    patches_only = config.get("mm_vision_select_feature", "patch") == "patch"
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_id,
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default" if patches_only else "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    anyres = config.get("image_aspect_ratio") == "anyres"
    if anyres:
        points = [(h, w) for w, h in config["image_grid_pinpoints"]]
        full: Any = LlavaNextConfig(**common, image_grid_pinpoints=points)
        build: Any = LlavaNextForConditionalGeneration
    else:
        full, build = LlavaConfig(**common), LlavaForConditionalGeneration
    extra = {} if attn is None else {"attn_implementation": attn}
    with torch.device("meta"):
        model = build._from_config(full, dtype=dtype, **extra)
    vision_model = CLIPVisionModel.from_pretrained(source, dtype=dtype)
    state = _renamed(folder, vision_model.state_dict(), bool(config.get("unfreeze_mm_vision_tower")))
    _fill(model, state, dtype, str(folder))
    _rebuild_buffers(model)
    _add_placeholder(model)
    model.generation_config.pad_token_id = config.get("pad_token_id") or 0
    for name in ("bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, config.get(name))
    return model, image_processor(source)


PROJECTOR = {"model.mm_projector.0.": "linear_1.", "model.mm_projector.2.": "linear_2."}


def rename(name: str) -> str:
    """transformers' name of a tensor of haotian-liu/LLaVA's format (language model, projector, newline)."""
    for old, new in PROJECTOR.items():
        if name.startswith(old):
            return f"model.multi_modal_projector.{new}{name.removeprefix(old)}"
    if name in ("model.image_newline", "lm_head.weight") or not name.startswith("model."):
        return name
    return f"model.language_model.{name.removeprefix('model.')}"


def _renamed(folder: Path, tower: dict[str, Tensor], unfrozen: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the original format under transformers' names.

    As in package llava, tower weights of the checkpoint are used only where the tower was trained (`unfrozen`), and a
    checkpoint without a head has that of its embeddings.
    """
    seen, embeddings, head = set(), None, False
    for name, value in tensors(folder):
        head = head or name == "lm_head.weight"
        embeddings = value if name == "model.embed_tokens.weight" else embeddings
        if name.startswith("model.vision_tower."):
            if not unfrozen:
                continue
            short = name.removeprefix("model.vision_tower.vision_tower.")
            short = short if short in tower else short.removeprefix("vision_model.")
            seen.add(short)
            yield f"model.vision_tower.{short}", value
        else:
            yield rename(name), value
    if not head and embeddings is not None:
        yield "lm_head.weight", embeddings.clone()
    for short, value in tower.items():
        if short not in seen:
            yield f"model.vision_tower.{short}", value


def _rebuild_buffers(model: Any) -> None:
    """Buffers that no checkpoint stores (rotary frequencies, position numbers) for a model built on meta."""
    inner = model.model
    lm = inner.language_model
    lm.rotary_emb = type(lm.rotary_emb)(config=lm.config)
    for module in inner.vision_tower.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.register_buffer("position_ids", torch.arange(ids.shape[-1])[None], persistent=False)
    left = [n for n, b in model.named_buffers() if b.is_meta]
    if left:
        raise ValueError(f"buffers {left} are not known; this transformers release is not supported")


def _add_placeholder(model: Any) -> None:
    """One more input embedding for the placeholder id, which is past the vocabulary."""
    old = model.get_input_embeddings()
    if model.config.image_token_id < old.num_embeddings:
        return
    new = nn.Embedding(old.num_embeddings + 1, old.embedding_dim, padding_idx=old.padding_idx, device="meta")
    weight = torch.cat([old.weight.data, old.weight.data.new_zeros(1, old.embedding_dim)])
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    model.set_input_embeddings(new)


def load_transformers(folder: Path, config: dict[str, Any], dtype: torch.dtype, attn: str | None) -> tuple[Any, Any]:
    """transformers' own format. A placeholder past the vocabulary, as `load_converted` makes it, is read back."""
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    shards(folder)
    build: Any = LlavaForConditionalGeneration if config["model_type"] == "llava" else LlavaNextForConditionalGeneration
    vocabulary = (config.get("text_config") or {}).get("vocab_size")
    past = vocabulary is not None and config.get("image_token_id", config.get("image_token_index")) == vocabulary
    model, info = _from_pretrained(build, folder, dtype, attn, ignore_mismatched_sizes=past)
    if past:
        _read_placeholder(model, folder, info["mismatched_keys"])
    has_processor = (folder / "preprocessor_config.json").is_file()
    return model, image_processor(str(folder)) if has_processor else None


def _read_placeholder(model: Any, folder: Path, mismatched: Any) -> None:
    """Input embeddings of the vocabulary and the placeholder after it, which transformers found one vector too long.

    Raises:
        ValueError: when anything else has a size that the config does not ask for.
    """
    last = "embed_tokens.weight"
    names = sorted(str(m[0] if isinstance(m, tuple) else m) for m in mismatched)
    _add_placeholder(model)
    weight = model.get_input_embeddings().weight
    stored = [v for n, v in tensors(folder) if n.endswith(last)]
    wrong = [n for n in names if not n.endswith(last)]
    if wrong or len(stored) != 1 or stored[0].shape[1] != weight.shape[1] or len(weight) - len(stored[0]) not in (0, 1):
        shapes = [tuple(v.shape) for v in stored]
        raise ValueError(f"{folder}: {wrong or last} have other sizes than the config asks for (embeddings {shapes})")
    with torch.no_grad():
        weight[: len(stored[0])] = stored[0].to(weight)
