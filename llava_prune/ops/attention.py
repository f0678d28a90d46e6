"""Scores of tokens from recorded attention.

Shapes: B samples, H heads, Q query positions, L key positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def text_attention(attention: Tensor, text: Tensor, kernels: Any = None) -> Tensor:
    """Return the attention on each key position, mean over heads and over the text tokens of a sample.

    Args:
        attention: (B, H, Q, L) float32.
        text: (B, Q) bool, text tokens among the query positions; or (B, Q) float, the weights of the query positions
            (`mean_weights`), for callers that reuse them in every layer.
        kernels: see `View.kernels`.

    Returns:
        (B, L) float32; the attention of a query on a key counts as 0 if it is NaN in any head.
    """
    weight = text if text.is_floating_point() else mean_weights(text)  # (B, Q)
    if kernels is not None:
        looked: Tensor = kernels.looked_at(attention, weight)
        return looked
    return (weight[:, None] @ attention.mean(1).nan_to_num_())[:, 0]


def mean_weights(text: Tensor) -> Tensor:
    """Return (B, Q) float32: the weight of each position in a mean over the `text` positions, (B, Q) bool."""
    return text / text.sum(1, keepdim=True).clamp(min=1)


def last_attention(attention: Tensor, product: bool = False) -> Tensor:
    """Return the attention of the last query position on each key position, mean over heads.

    Args:
        attention: (B, H, Q, L) float32.
        product: rank by the mean of dot products instead. A head's log-softmax is its dot product minus a constant of
            the query, so the mean of log-softmax gives the same ranking. Positions whose attention underflows tie.

    Returns:
        (B, L) float32.
    """
    last = attention[:, :, -1]  # (B, H, L)
    return (last.clamp(min=torch.finfo(last.dtype).tiny).log() if product else last).mean(1)
