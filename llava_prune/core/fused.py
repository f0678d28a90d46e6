"""Whether the Triton kernels of `kernels.py` do the work of a cut, or plain torch does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

OLDEST = "3.3"
"""Triton that the kernels were compiled with, at least."""
_KERNELS: ContextVar[Any] = ContextVar("llava_prune_kernels", default=None)


def load(device: torch.device) -> Any:
    """The module of the kernels.

    Raises:
        ValueError: without triton of at least OLDEST, or for a device it does not serve (TRITON_INTERPRET=1 serves any,
            slowly).
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"fused=True needs a CUDA device, and the model is on {device}; leave fused out")
    try:
        import triton

        if Version(triton.__version__) < Version(OLDEST):
            raise ImportError(f"this is {triton.__version__}")
        from . import kernels
    except ImportError as error:
        raise ValueError(f"fused=True needs triton >= {OLDEST} ({error}): install it, or leave fused out") from error
    return kernels


@contextmanager
def use(kernels: Any, device: torch.device) -> Iterator[None]:
    """Use `kernels`, which `load` gave, on tensors of a device; None for plain torch."""
    if kernels is None:
        yield
        return
    token = _KERNELS.set(kernels)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # where triton starts them
            yield
    finally:
        _KERNELS.reset(token)


def kernels_for(x: Tensor) -> Any:
    """The module of the kernels where they are to be used on `x` (B, ..., L), None for plain torch."""
    kernels = _KERNELS.get()
    return kernels if kernels is not None and not x.requires_grad else None
