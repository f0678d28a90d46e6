"""All imports of transformers internals."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaModel, repeat_kv, rotate_half

FLOOR = Version("5.14")

if Version(transformers.__version__) < FLOOR:
    raise ImportError(f"transformers {transformers.__version__} is too old for llava_prune; install >= {FLOOR}")

CACHES = ("cache", "past_key_values")
"""Names of the argument that holds the KV cache: `cache` since transformers 5.24, `past_key_values` before."""
CACHE = next(name for name in CACHES if name in inspect.signature(LlamaModel.forward).parameters)
"""The name in the installed release."""

CAUSAL = ("sdpa", "flash_attention_2")
"""Attention backends that are causal without a mask, and that also take a bool mask which `create_causal_mask` has not
made: (B, 1, q, keys) for sdpa, (B, keys) for flash attention."""


def given_cache(given: Mapping[str, Any]) -> Any:
    """Return the KV cache among the arguments of a call, under either name, or None."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


def split_by_plan(model: Any, processes: int) -> None:
    """Split a model in memory over the processes in place, by the model's own plan (`tp_plan="auto"`).

    Raises:
        ValueError: for a transformers release that can split a model only while loading it.
    """
    from torch.distributed import get_backend
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        plan = model._resolve_parallel_plans(DistributedConfig(tp_size=processes, tp_plan="auto"))[0]
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"engine='tp' is not supported with transformers {transformers.__version__} (tested with 5.24.0); upgrade "
            "it, or use engine='deepspeed'"
        ) from error
    mesh = init_device_mesh("cuda" if get_backend() == "nccl" else "cpu", (processes,), mesh_dim_names=("tp",))
    apply_tensor_parallelism(model, mesh, plan)


__all__ = [
    "CACHE",
    "CACHES",
    "CAUSAL",
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPooling",
    "DynamicCache",
    "create_causal_mask",
    "given_cache",
    "repeat_kv",
    "rotate_half",
    "split_by_plan",
]
