"""Products of few rows on a CPU, by oneDNN in place of torch's default library.

torch multiplies float32 by MKL. At the hundred rows that a pruned sequence has, with weights that are not in the
caches, MKL reached two thirds of the rate that it has at 660 rows and that oneDNN has at both (docs/performance.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""What torch.compile makes of a linear layer on a CPU; None in builds without oneDNN."""
WIDTH = 512
"""Narrower models gain nothing: a call costs ten microseconds more."""


class _OneDNN(TorchFunctionMode):
    """Linear layers that run inside, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs and all(_plain(x) for x in args[:2]):
            return PRODUCT(args[0], args[1], args[2] if len(args) > 2 else None, "none", [], "")
        return func(*args, **(kwargs or {}))


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided


def few_rows(hidden: Tensor) -> AbstractContextManager[Any]:
    """Enter it for a decoder layer on the rows (B, L, D) that a cut has left: its products are quicker then.

    Nothing changes on other devices, in other dtypes, with gradients, below WIDTH, without oneDNN, or inside
    `torch.backends.mkldnn.flags(enabled=False)`. Results are the same up to rounding.
    """
    usable = PRODUCT is not None and torch.backends.mkldnn.enabled and not torch.is_grad_enabled()
    return _OneDNN() if usable and hidden.shape[2] >= WIDTH and _plain(hidden) else nullcontext()
