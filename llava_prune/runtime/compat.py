"""The only imports of transformers internals."""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

FLOOR = Version("5.14")

if Version(transformers.__version__) < FLOOR:
    raise ImportError(f"transformers {transformers.__version__} is too old for llava_prune; install >= {FLOOR}")

CAUSAL = ("sdpa", "flash_attention_2")
"""Backends that are causal by themselves when no mask is given, and take a mask of theirs without `create_causal_mask`:
bool (B, 1, q, keys) or (B, keys)."""

__all__ = [
    "CAUSAL",
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPooling",
    "DynamicCache",
    "create_causal_mask",
    "repeat_kv",
    "rotate_half",
]
