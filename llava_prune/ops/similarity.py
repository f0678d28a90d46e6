"""Cosine similarity of tokens.

Shapes: B samples or images, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Lower limit of a norm, so that a token of zeros has similarity 0 with every token."""


def wide(x: Tensor) -> Tensor:
    """Convert a tensor to at least float32: half precision is converted, float64 is returned unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Normalise (B, T, D) tokens to length 1 in at least float32; tokens of zeros stay zero."""
    return torch.nn.functional.normalize(wide(x), dim=2, eps=SMALLEST)


def cosines(x: Tensor) -> Tensor:
    """Return (B, T, T) cosine similarity of all pairs of (B, T, D) tokens, in at least float32."""
    rows = unit(x)
    return rows @ rows.transpose(1, 2)
