"""Choose tokens by score, and assemble the remaining tokens of a batch whose samples may keep different numbers.

Counts are host integers, so no function here synchronises with the device.

Shapes: B samples, L token positions, K or L' positions afterwards, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Positions = slice | Tensor
"""Token positions of a sequence: a slice with start and stop (indexing copies nothing), or a long tensor (Q,)."""


@dataclass(frozen=True)
class Cut:
    """The tokens that remain after a layer, in output order.

    Attributes:
        index: (B, L') long, indices into the L tokens of the sequence followed by the C tokens of `merged`.
        merged: (B, C, D) new tokens, or None.
        valid: (B, L') bool, False on ragged padding; None if no position is padding.
        members: function that returns the tokens that the merged tokens were made of: (B, Q) long, positions among the
            L tokens, and (B, Q) long, for each of them its merged token among the C, -1 for none. Only records call it.
    """

    index: Tensor
    merged: Tensor | None = None
    valid: Tensor | None = None
    members: Callable[[], tuple[Tensor, Tensor]] | None = None


def descending_order(score: Tensor, among: Tensor) -> Tensor:
    """Sort positions by score, best first, ties by position; positions not in `among` come last.

    Args:
        score: (B, L) float. NaN counts as the lowest score.
        among: (B, L) bool.

    Returns:
        (B, L) long.
    """
    key = torch.nan_to_num(score.float(), nan=-3e38, posinf=3e38, neginf=-3e38)
    return torch.where(among, key, -torch.inf).sort(dim=1, descending=True, stable=True).indices  # (B, L)


def true_first(mask: Tensor) -> Tensor:
    """Return (B, L) long: the positions at which a (B, L) bool mask is True in order, then the others in order."""
    return (~mask).to(torch.int8).sort(dim=1, stable=True).indices


def inverse(order: Tensor) -> Tensor:
    """Return (B, L) long: the rank of each position in an order, (B, L) long."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)  # (B, L)


def descending_rank(score: Tensor, among: Tensor) -> Tensor:
    """Return (B, L) long: the rank of each position by score, 0 for the best; see `descending_order`."""
    return inverse(descending_order(score, among))


def top(order: Tensor, counts: Sequence[int], among: Tensor) -> Tensor:
    """Return (B, L) bool: True on the first counts[b] entries of a `descending_order` with the same `among`."""
    if len(set(counts)) == 1:
        return torch.zeros_like(among).scatter_(1, order[:, : counts[0]], True)
    return among & (inverse(order) < column(counts, order))


def to_device(values: Sequence[Any], like: Tensor) -> Tensor:
    """Copy host integers to a long tensor on the device of `like`, without synchronising."""
    return torch.tensor(values, dtype=torch.long).to(like.device, non_blocking=True)


def column(values: Sequence[int], like: Tensor) -> Tensor:
    """Copy host integers to a (B, 1) long tensor on the device of `like`."""
    return to_device(values, like)[:, None]


def per_sample(values: Sequence[int], like: Tensor) -> Tensor | int:
    """Return `column(values, like)`, or a plain integer if all values are equal, which saves the copy to the device."""
    return values[0] if len(set(values)) == 1 else column(values, like)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather (B, K, D) tokens from (B, L, D) by (B, K) long; copies whole vectors instead of single elements."""
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
    """Make a cut: kept tokens in order, merged tokens after the last visual position, samples right-aligned.

    Args:
        keep: (B, L) bool, visual tokens to keep. Tokens that are not visual are kept if they are valid.
        visual: (B, L) bool, visual tokens.
        valid: (B, L) bool, False on padding.
        lengths: number of tokens of each sample afterwards: text, kept and merged.
        merged: (B, C, D) new tokens, or None.
        merged_counts: number of the C tokens that each sample has.
        after: (B, C) long, the position that each merged token follows; None for the last visual position.

    Returns:
        Cut with L' = max(lengths); `valid` is None if all samples have that length.
    """
    n_merged = 0 if merged is None else merged.shape[1]
    step = n_merged + 1  # leaves room for all merged tokens between two positions
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


def arranged(
    order: Tensor,
    counts: Sequence[int],
    places: Tensor,
    visual: Tensor,
    valid: Tensor,
    lengths: Sequence[int],
    merged: Tensor | None = None,
) -> Cut:
    """Make a right-aligned cut with chosen visual tokens in a given order; text stays in place.

    The j-th token of the order takes the j-th position of the chosen tokens in sequence order. A new token counts as
    one at the last visual position.

    Args:
        order: (B, K) long, indices into the V visual tokens of a sample followed by the C tokens of `merged`, without
            repetition.
        counts: number of real entries of each row of `order`; the largest is K.
        places: (B, V) long, positions of the visual tokens.
        visual: (B, L) bool, visual tokens.
        valid: (B, L) bool, False on padding.
        lengths: number of tokens of each sample afterwards.
        merged: (B, C, D) new tokens, or None.
    """
    (batch, length), (n_chosen, n_visual) = visual.shape, (order.shape[1], places.shape[1])
    device, n_merged = order.device, 0 if merged is None else merged.shape[1]
    numbers, slots = torch.arange(length + n_merged, device=device), torch.arange(n_chosen, device=device)
    extra = numbers[length:].expand(batch, -1)
    token = torch.cat([places, extra], 1).gather(1, order)  # (B, K) into L + C
    real = (slots < per_sample(counts, order)).expand_as(order)
    last = (visual * numbers[:length]).amax(1, keepdim=True)
    slot = torch.where(order < n_visual, token, last).masked_fill(~real, length).sort(dim=1).values
    step = n_chosen + 1  # leaves room for all chosen tokens after one position
    text = torch.where(valid & ~visual, numbers[:length] * step, -1)  # (B, L)
    key = torch.cat([text, torch.where(real, slot * step + 1 + slots, -1)], 1)  # (B, L + K)
    ordered, found = key.sort(dim=1, stable=True)
    index = torch.cat([numbers[:length].expand(batch, -1), token], 1).gather(1, found)
    width = max(lengths)
    live = None if all(n == width for n in lengths) else ordered[:, -width:] >= 0
    return Cut(index[:, index.shape[1] - width :], merged, live)
