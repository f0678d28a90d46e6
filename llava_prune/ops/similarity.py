"""Cosine similarity of tokens.

Shapes: B samples or images, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Lower limit of a norm, so that a token of zeros is similar to none."""


def wide(x: Tensor) -> Tensor:
    """At least float32: half precision is converted, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """(B, T, D) tokens of length 1 in at least float32; tokens of zeros stay zero."""
    return torch.nn.functional.normalize(wide(x), dim=2, eps=SMALLEST)


def cosines(x: Tensor) -> Tensor:
    """(B, T, T) cosine similarity of every two tokens of (B, T, D), in at least float32."""
    rows = unit(x)
    return rows @ rows.transpose(1, 2)
