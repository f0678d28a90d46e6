"""Choose tokens by score and close the gaps of a batch whose samples keep different numbers of tokens.

Counts are host integers, so that no function here synchronises with the device.

Shapes: B samples, L token positions, K or L' positions afterwards, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Positions = slice | Tensor
"""Token positions of a sequence: a slice with start and stop (nothing is copied), or a long tensor (Q,)."""


@dataclass(frozen=True)
class Cut:
    """The tokens that remain after a layer, in output order.

    Attributes:
        index: (B, L') long, into the L tokens of the sequence followed by the C tokens of `merged`.
        merged: (B, C, D) new tokens, or None.
        valid: (B, L') bool, False on ragged padding; None when no position is padding.
        members: what the merged tokens were made of: a function that returns positions (B, Q) among the L tokens, and
            for each of them its place (B, Q) among the C merged tokens, -1 for none. Only records call it.
    """

    index: Tensor
    merged: Tensor | None = None
    valid: Tensor | None = None
    members: Callable[[], tuple[Tensor, Tensor]] | None = None


def descending_order(score: Tensor, among: Tensor) -> Tensor:
    """Positions by score, best first, ties by position; positions not in `among` come last.

    Args:
        score: (B, L) float. NaN counts as the lowest score.
        among: (B, L) bool.

    Returns:
        (B, L) long.
    """
    key = torch.nan_to_num(score.float(), nan=-3e38, posinf=3e38, neginf=-3e38)
    return torch.where(among, key, -torch.inf).sort(dim=1, descending=True, stable=True).indices  # (B, L)


def inverse(order: Tensor) -> Tensor:
    """The rank of each position in an order: (B, L) long to (B, L) long."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)  # (B, L)


def descending_rank(score: Tensor, among: Tensor) -> Tensor:
    """(B, L) long rank of each position, 0 for the best; see `descending_order`."""
    return inverse(descending_order(score, among))


def top(order: Tensor, counts: Sequence[int], among: Tensor) -> Tensor:
    """(B, L) bool, True on the first counts[b] entries of an order (see `descending_order`, with the same `among`)."""
    if len(set(counts)) == 1:
        return torch.zeros_like(among).scatter_(1, order[:, : counts[0]], True)
    return among & (inverse(order) < column(counts, order))


def to_device(values: Sequence[Any], like: Tensor) -> Tensor:
    """Host integers as a long tensor on the device of `like`, copied without synchronising."""
    return torch.tensor(values, dtype=torch.long).to(like.device, non_blocking=True)


def column(values: Sequence[int], like: Tensor) -> Tensor:
    """Host integers as a (B, 1) long tensor on the device of `like`."""
    return to_device(values, like)[:, None]


def per_sample(values: Sequence[int], like: Tensor) -> Tensor | int:
    """`column`, or the plain integer when all samples share it, which saves the copy to the device."""
    return values[0] if len(set(values)) == 1 else column(values, like)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, K, D) tokens of (B, L, D) by (B, K) long; copies whole vectors, where `gather` copies single elements."""
    batch, length, width = tokens.shape
    flat = index if batch == 1 else index + torch.arange(batch, device=index.device)[:, None] * length
    return tokens.reshape(batch * length, width).index_select(0, flat.reshape(-1)).view(batch, index.shape[1], width)


def assemble(
    keep: Tensor,
    visual: Tensor,
    valid: Tensor,
    lengths: Sequence[int],
    merged: Tensor | None = None,
    merged_counts: Sequence[int] = (),
    after: Tensor | None = None,
) -> Cut:
    """Close the gaps: kept tokens in order, merged tokens after the last visual position, samples right-aligned.

    Args:
        keep: (B, L) bool, visual tokens to keep. Tokens that are not visual are kept if they are valid.
        visual: (B, L) bool.
        valid: (B, L) bool.
        lengths: tokens of each sample afterwards: text, kept and merged.
        merged: (B, C, D) new tokens, or None.
        merged_counts: how many of the C belong to each sample.
        after: (B, C) long, the position that each merged token follows; None for the last visual position.

    Returns:
        Cut with L' = max(lengths); `valid` is None when all samples have that length.
    """
    n_merged = 0 if merged is None else merged.shape[1]
    step = n_merged + 1  # between two positions there is room for all merged tokens
    places = torch.arange(0, keep.shape[1] * step, step, device=keep.device)
    key = torch.where(torch.where(visual, keep, valid), places, -1)  # (B, L)
    if merged is not None:
        start = (visual * places).amax(1, keepdim=True) if after is None else after * step  # (B, 1 or C)
        slots = torch.arange(1, step, device=keep.device)
        extra = start + slots  # (B, C)
        if any(n != n_merged for n in merged_counts):
            extra = extra.masked_fill(slots > column(merged_counts, keep), -1)
        key = torch.cat([key, extra], 1)  # (B, L + C)
    ordered, index = key.sort(dim=1, stable=True)
    width = max(lengths)
    live = None if all(n == width for n in lengths) else ordered[:, -width:] >= 0
    return Cut(index[:, index.shape[1] - width :], merged, live)
