"""Scores of tokens from recorded attention.

Shapes: B samples, H heads, Q query positions, L key positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def text_attention(attention: Tensor, text: Tensor, kernels: Any = None) -> Tensor:
    """Attention on each key position, mean over heads and over the text tokens of a sample.

    Args:
        attention: (B, H, Q, L) float32.
        text: (B, Q) bool, or the weights of the query positions (`mean_weights`), for callers that use them in
            every layer.
        kernels: see `View.kernels`.

    Returns:
        (B, L) float32; a query whose attention is not finite in some head counts 0.
    """
    weight = text if text.is_floating_point() else mean_weights(text)  # (B, Q)
    if kernels is not None:
        looked: Tensor = kernels.looked_at(attention, weight)
        return looked
    return (weight[:, None] @ attention.mean(1).nan_to_num_())[:, 0]


def mean_weights(text: Tensor) -> Tensor:
    """(B, Q) float32: the weight of each position in a mean over the positions that are `text`, (B, Q) bool."""
    return text / text.sum(1, keepdim=True).clamp(min=1)


def last_attention(attention: Tensor, product: bool = False) -> Tensor:
    """Attention of the last query position on each key position, mean over heads.

    Args:
        attention: (B, H, Q, L) float32.
        product: average the dot products instead. A head's log-softmax is its dot product less a constant of the
            query, so the mean of log-softmax ranks alike. Positions whose attention underflows tie.

    Returns:
        (B, L) float32.
    """
    last = attention[:, :, -1]  # (B, H, L)
    return (last.clamp(min=torch.finfo(last.dtype).tiny).log() if product else last).mean(1)
