"""The vision tower of a checkpoint in LLaVA's format: a separate CLIP, given by a folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .base import block_index
from .files import ATTENTION, shapes
from .fit import check_depth, check_elements, check_positive, refuse_missing, refuse_sizes, refuse_spare

KINDS = ("clip", "clip_vision_model")
OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""Prefixes of the names of tensors in a complete CLIP that do not belong to its vision tower."""


def tower_config(place: str, model: dict[str, Any]) -> Any:
    """Read the config of a tower and check that it is a CLIP that fits the config of a model.

    Entries that name an attention backend are dropped: nothing depends on them, and transformers would download some
    backends.

    Args:
        place: folder or hub id of the tower.
        model: content of the model's config.json.

    Raises:
        ValueError: with the entry that does not fit.
    """
    from transformers import CLIPVisionConfig

    raw, _ = CLIPVisionConfig.get_config_dict(place)
    file = Path(place) / "config.json"
    if raw.get("model_type") not in KINDS:
        raise ValueError(
            f"{file}: model_type {raw.get('model_type')!r} is not supported; the vision tower must be a CLIP"
        )
    inner = raw.get("vision_config") if raw["model_type"] == "clip" else raw
    if not isinstance(inner, dict):
        raise ValueError(f"{file}: vision_config is {inner!r}; it must be an object")
    config = CLIPVisionConfig.from_dict({k: v for k, v in inner.items() if k not in ATTENTION})
    check_vision(config, file)
    block_index(model["mm_vision_select_layer"], config.num_hidden_layers)
    if model.get("mm_hidden_size") != config.hidden_size:
        raise ValueError(
            f"mm_hidden_size is {model.get('mm_hidden_size')}, and the vision tower {place} has hidden_size "
            f"{config.hidden_size}"
        )
    return config


def check_vision(config: Any, file: Path) -> None:
    """Refuse a vision config whose sizes are not positive integers.

    Raises:
        ValueError: with the entry.
    """
    for name in ("num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "hidden_size"):
        check_positive(file, f"{name} of the vision tower", getattr(config, name, 1))


def load_tower(place: str, config: Any, dtype: torch.dtype) -> Any:
    """Load the vision model and check that the tower's files contain exactly its weights.

    Raises:
        ValueError: for weights that are missing, superfluous, integers or of the wrong size.
    """
    from transformers import CLIPVisionModel

    build: Any = CLIPVisionModel
    if Path(place).is_dir():
        stored = {n: s for n, s in shapes(Path(place)).items() if not n.startswith(OTHER_PARTS)}
        check_depth(stored, config.num_hidden_layers, place)
        check_elements(build, config, stored, place)
    options: dict[str, Any] = {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "attn_implementation": "sdpa",
    }
    model, info = build.from_pretrained(place, config=config, dtype=dtype, **options)
    refuse_sizes(info["mismatched_keys"], place)
    refuse_missing(info["missing_keys"], place)
    refuse_spare((n for n in info["unexpected_keys"] if not n.startswith(OTHER_PARTS)), place, "a CLIP vision tower")
    return model
