"""Merge tokens of a vision tower into others, weighted by size.

Shapes: N images or crops, t tokens, t' tokens afterwards, r tokens merged (t = t' + r), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import take


@dataclass(frozen=True)
class Merge:
    """Which tokens are merged into which.

    Attributes:
        kept: (N, t') long, the tokens that remain, in output order.
        merged: (N, r) long, the tokens that are merged into another.
        destination: (N, r) long, for each of them the position in `kept` of the token that it is merged into.
    """

    kept: Tensor
    merged: Tensor
    destination: Tensor


def merge_tokens(merge: Merge, states: Tensor, size: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens by means weighted by size.

    No atomic operations are used, so results are bitwise reproducible.

    Args:
        merge: which tokens are merged into which.
        states: (N, t, D) states of the tokens.
        size: (N, t) float32, number of patches in each token.
        groups: (N, T) long, the token that contains each patch.

    Returns:
        (N, t', D) states in the dtype of `states`, (N, t') sizes and (N, T) groups after the merge. A token that
        receives no other token is bitwise unchanged.
    """
    count = merge.kept.shape[1]
    joins = torch.nn.functional.one_hot(merge.destination, count).transpose(1, 2).float()  # (N, t', r)
    weighted = states.float() * size[..., None]  # (N, t, D)
    total = take(weighted, merge.kept) + joins @ take(weighted, merge.merged)  # (N, t', D)
    before = size.gather(1, merge.kept)
    after = before + (joins @ size.gather(1, merge.merged)[..., None])[..., 0]  # (N, t')
    mean = (total / after[..., None]).to(states.dtype)
    out = torch.where((after == before)[..., None], take(states, merge.kept), mean)
    places = torch.arange(count, device=states.device).expand(states.shape[0], -1)
    moved = torch.empty(states.shape[:2], dtype=torch.long, device=states.device)
    moved = moved.scatter(1, merge.kept, places).scatter(1, merge.merged, merge.destination)  # (N, t)
    return out, after, moved.gather(1, groups)
