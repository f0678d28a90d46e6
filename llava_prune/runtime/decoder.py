"""The decoder layers of the supported language models: what they share and how they differ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ARCHITECTURES = {"LlamaDecoderLayer": "Llama", "MistralDecoderLayer": "Mistral"}
ARCHITECTURES |= {"Qwen2DecoderLayer": "Qwen2", "Qwen3DecoderLayer": "Qwen3"}
"""Class name of a supported decoder layer -> architecture. The parts of these layers have the same names and are called
in the same order. An attention module with `q_norm` and `k_norm` (Qwen3) normalises each head between projection and
rotary embedding."""
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""Attributes that a decoder layer must have in addition to its class name."""
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "head_dim", "scaling", "num_key_value_groups")
"""Attributes that its attention module must have, so that attention can be computed next to the layer."""


def architecture(lm: Any) -> str | None:
    """Return the architecture of a language model by the class of its decoder layers; None if it is not supported."""
    one_of_each = {type(layer): layer for layer in getattr(lm, "layers", ())}
    kinds = {_kind(layer) for layer in one_of_each.values()}
    return kinds.pop() if len(kinds) == 1 else None


def _kind(layer: Any) -> str | None:
    whole = all(hasattr(layer, part) for part in PARTS)
    if not whole or not all(hasattr(layer.self_attn, part) for part in ATTENTION_PARTS):
        return None
    return next((ARCHITECTURES[c.__name__] for c in type(layer).__mro__ if c.__name__ in ARCHITECTURES), None)


def refuse_window(lm: Any) -> None:
    """Refuse a language model that attends to a sliding window of the last tokens only.

    Visual tokens outside the window would count as kept although no layer attends to them, and layers of different
    cache lengths would have windows over different tokens.

    Raises:
        ValueError: if the layers use a sliding window. The message says how to disable it.
    """
    config = lm.config
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else architecture(lm) == "Mistral"
    window = getattr(config, "sliding_window", None)
    if window is not None and slides:
        off = "use_sliding_window to false" if hasattr(config, "use_sliding_window") else "sliding_window to null"
        raise ValueError(
            f"{type(lm).__name__} attends to a sliding window of {window} tokens, which is not supported; where no "
            f"prompt with its answer is longer, nothing changes without it: set {off} in the language model's config"
        )


def heads(attn: Any, which: str, projected: Tensor) -> Tensor:
    """Return (B, H, n, dh) queries or keys before the rotary embedding.

    Args:
        attn: attention module of a decoder layer.
        which: "q" or "k".
        projected: (B, n, H dh) output of `q_proj` or `k_proj`.
    """
    split = projected.view(*projected.shape[:2], -1, attn.head_dim)  # (B, n, H, dh)
    norm = getattr(attn, f"{which}_norm", None)
    return (split if norm is None else norm(split)).transpose(1, 2)
