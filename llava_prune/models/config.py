"""Read and check the config of a checkpoint, and choose dtype, device and attention backend."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from .files import ATTENTION, read_json
from .fit import check_positive

BACKENDS = ("eager", "sdpa", "flash_attention_2")
PROJECTORS = re.compile(r"linear|identity|mlp[1-9]\d?x_gelu")
MERGES = ("flat", "spatial", "spatial_unpad")
ORIGINAL = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}
"""Language model for each `model_type` in haotian-liu/LLaVA's format."""
CONVERTED = ("llava", "llava_next", "llava_onevision")
"""Supported values of `model_type` in transformers' format."""
LANGUAGES = ("llama", "mistral", "qwen2", "qwen3")
"""Supported values of the language model's `model_type` in transformers' format."""
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
"""Entries of a language model's config that must be positive integers."""
SMALL = 1 << 30
"""On a CPU, a half-precision checkpoint is loaded as float32 if its weight files have fewer bytes than this."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the config.json of a checkpoint.

    Raises:
        ValueError: if it is missing, broken or not that of a supported LLaVA.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a checkpoint folder")
    config = read_json(file)
    kind = config.get("model_type")
    if kind not in (tuple(ORIGINAL) if is_original(config) else CONVERTED):
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported; give a LLaVA checkpoint in LLaVA's format "
            f"({', '.join(ORIGINAL)}) or in transformers' ({', '.join(CONVERTED)})"
        )
    for name in ("torch_dtype", "dtype"):
        if config.get(name) is not None and not _is_float(config[name]):
            raise ValueError(f"{file}: {name} is {config[name]!r}; it must be float32, float16 or bfloat16")
    if is_original(config):
        check_original(file, config)
    else:
        _check_converted(file, config)
    _check_sizes(file, config.get("text_config", config))
    return config


def _check_sizes(file: Path, language: dict[str, Any]) -> None:
    """Refuse sizes of the language model that are not positive integers."""
    for name in SIZES:
        if language.get(name) is not None:
            check_positive(file, name, language[name])


def _check_converted(file: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json in transformers' format with a language model that cannot be pruned."""
    text = config["text_config"]
    if not isinstance(text, dict):
        raise ValueError(f"{file}: text_config is {text!r}; it must be the language model's config")
    kind = text.get("model_type", LANGUAGES[0])
    if kind not in LANGUAGES:
        raise ValueError(
            f"{file}: the language model {kind!r} (model_type in text_config) is not supported; it must be one of "
            f"{', '.join(LANGUAGES)}"
        )


def _is_float(name: Any) -> bool:
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return isinstance(found, torch.dtype) and found.is_floating_point


def check_generation(file: Path) -> None:
    """Refuse a broken generation_config.json, which transformers would ignore silently.

    Raises:
        ValueError: with the file and the entry.
    """
    if not file.is_file():
        return
    for name, value in read_json(file).items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and value is not None and not all(type(i) is int for i in ids):
            raise ValueError(f"{file}: {name} is {value!r}; it must be a token id, or a list of them")


def is_original(config: dict[str, Any]) -> bool:
    """Return whether a config.json is in haotian-liu/LLaVA's format."""
    return "text_config" not in config


def check_original(file: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json in haotian-liu/LLaVA's format with entries that the two packages would read differently.

    Raises:
        ValueError: with the entry and its supported values.
    """
    names, language = config.get("architectures") or [], ORIGINAL[config["model_type"]].capitalize()
    strange = (
        [a for a in names if language not in str(a) and a != "LlavaForCausalLM"] if isinstance(names, list) else names
    )
    if strange:
        raise ValueError(
            f"{file}: architectures {names!r} is not supported; model_type {config['model_type']!r} goes with a "
            f"{language} language model"
        )
    if config.get("quantization_config"):
        raise ValueError(f"{file}: quantised weights (quantization_config) are not supported in LLaVA's format")
    if config.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        raise ValueError(
            f"{file}: mm_vision_select_feature is {config['mm_vision_select_feature']!r}; it must be 'patch' or "
            "'cls_patch'"
        )
    if not isinstance(config.get("mm_vision_tower"), str):
        raise ValueError(
            f"{file}: mm_vision_tower is {config.get('mm_vision_tower')!r}; name the vision tower that the model was "
            "trained with, a folder or hub id (LLaVA-1.5: openai/clip-vit-large-patch14-336)"
        )
    layer = config.get("mm_vision_select_layer")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(
            f"{file}: mm_vision_select_layer is {config.get('mm_vision_select_layer')!r}; give the layer of the vision "
            "tower that the model was trained with (LLaVA-1.5: -2)"
        )
    projector = config.get("mm_projector_type", "linear")
    if not isinstance(projector, str) or not PROJECTORS.fullmatch(projector):
        raise ValueError(f"{file}: mm_projector_type {projector!r} is not supported; it must be linear or mlp2x_gelu")
    merge = config.get("mm_patch_merge_type", "flat")
    if merge not in MERGES:
        raise ValueError(f"{file}: mm_patch_merge_type is {merge!r}; it must be one of {', '.join(MERGES)}")
    for name in ("is_encoder_decoder", *(("sliding_window",) if language == "Llama" else ())):
        if config.get(name):
            raise ValueError(f"{file}: {name} is {config[name]!r}, which a {language} language model does not have")
    if config.get("tokenizer_model_max_length") is not None:
        check_positive(file, "tokenizer_model_max_length", config["tokenizer_model_max_length"])
    if config.get("image_aspect_ratio") == "anyres":
        _check_anyres(file, config)


def _check_anyres(file: Path, config: dict[str, Any]) -> None:
    points = config.get("image_grid_pinpoints")
    if not points:
        raise ValueError(
            f"{file}: image_aspect_ratio is 'anyres' and image_grid_pinpoints is missing; add the resolutions that the "
            "model was trained with (LLaVA-NeXT: [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])"
        )
    if not isinstance(points, list) or not all(_is_size(p) for p in points):
        raise ValueError(f"{file}: image_grid_pinpoints is {points!r}; it must be a list of [width, height]")


def _is_size(point: Any) -> bool:
    whole = isinstance(point, list) and len(point) == 2
    return whole and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in point)


def pick_dtype(dtype: Any, config: dict[str, Any], device: torch.device, size: int = SMALL) -> torch.dtype:
    """Return the requested dtype, else that of the checkpoint; on a CPU half precision is replaced.

    On a CPU a half-precision checkpoint is loaded as float32 if ``size``, the bytes of its weight files, is below
    `SMALL`, and as bfloat16 otherwise. Many CPUs have no bfloat16 arithmetic and take several times as long for it, but
    a large model may not fit into memory as float32. The rule does not depend on the machine, so results are the same
    on all machines.

    Args:
        dtype: a dtype, its name, "auto" or None.
        config: content of config.json.
        device: the device that the model computes on.
        size: bytes of the weight files.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    names |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in (None, "auto"):
        if dtype not in names:
            raise ValueError(f"dtype={dtype!r}: choose float32, float16 or bfloat16")
        return names[dtype]
    inner = config.get("text_config") or {}
    stored = config.get("torch_dtype") or config.get("dtype") or inner.get("torch_dtype") or inner.get("dtype")
    chosen = names.get(str(stored).removeprefix("torch."), torch.float16)
    if device.type != "cpu" or chosen is torch.float32:
        return chosen
    return torch.float32 if size < SMALL else torch.bfloat16


def weight_bytes(folder: Path) -> int:
    """Return the size of the weight files of a checkpoint in bytes."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))


def pick_device(device: Any) -> torch.device:
    """Return the requested device; by default cuda if it is available, else cpu.

    Raises:
        ValueError: for an unknown device, the meta device, or a device that this machine does not have.
    """
    try:
        found = torch.device(device if device not in (None, "") else ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not known; give cuda, cuda:1 or cpu") from error
    if found.type == "meta":
        raise ValueError("device='meta' holds no weights; give cuda, cuda:1 or cpu")
    if found.type == "cpu" and found.index:
        raise ValueError(f"device={str(device)!r} is not known; there is one cpu")
    if found.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(
                f"device={str(device)!r}: this machine does not have it; give cuda, cuda:1 or cpu"
            ) from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(f"device={str(device)!r}: this machine has {count} CUDA devices; give another or cpu")
    return found


def pick_attention(attn: str | None, config: dict[str, Any], file: Path) -> str | None:
    """Return the requested attention backend, else that of the config; None for the package's default.

    Raises:
        ValueError: for a backend that is not supported, such as a kernel that would be downloaded, or not installed.
    """
    stated = [config.get(name) for name in ATTENTION if config.get(name) is not None]
    where, found = ("attn", attn) if attn is not None else (f"{file}: attn_implementation", next(iter(stated), None))
    if found is None:
        return None
    if found not in BACKENDS:
        raise ValueError(f"{where}={found!r} is not supported; choose {', '.join(BACKENDS)} (attn)")
    if found == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            f"{where}={found!r} needs the package flash-attn (pip install flash-attn); or choose sdpa (attn)"
        )
    return str(found)
