"""Place the tokens of a vision cut in the sequences of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..methods.views import MERGED, PADDING
from ..ops.selection import Cut, column, to_device, true_first
from .state import ImageState, VisionTokens


@dataclass
class Placed:
    """The tokens of a vision cut in a batch of B samples; C is the largest number of tokens of a sample.

    Attributes:
        index: (B, C) long, indices into all N x K tokens of the request.
        after: (B, C) long, the position in the sequence after which each token is inserted.
        ids: (B, C) long, index of the visual token of the unpruned sequence with the same patch; MERGED for a token
            without a patch.
        counts: number of tokens of each sample.
    """

    index: Tensor
    after: Tensor
    ids: Tensor
    counts: list[int]


def in_place(cut: VisionTokens, source: Tensor) -> tuple[Tensor, Tensor]:
    """Find the token at each position for a cut whose tokens stay at the positions of their patches.

    Args:
        cut: the tokens of all images.
        source: (B, L) long, patch of each token, numbered over all images, -1 for none.

    Returns:
        (B, L) long, the token at each position, -1 for positions without a token; (B, L) bool, the positions that
        remain: those with a token, and those without a patch (text, newline tokens).
    """
    n, width = cut.ids.shape
    patches = cut.grid[0] * cut.grid[1]
    slots = torch.arange(n * width, device=cut.ids.device).view(n, width)
    real = torch.arange(width, device=cut.ids.device) < column(cut.counts, cut.ids)
    table = torch.full((n, patches + 1), -1, dtype=torch.long, device=cut.ids.device)
    table = table.scatter(1, cut.ids.masked_fill(~real, patches), slots)[:, :patches].flatten().to(source.device)
    token = table[source.clamp(min=0)].masked_fill(source < 0, -1)
    return token, (token >= 0) | (source < 0)


def first_positions(cut: VisionTokens, visual: Tensor, source: Tensor) -> Tensor:
    """Return (B, P) long: the first position of each of P images in each sample, -1 if the sample does not contain it.

    Args:
        cut: the tokens of all images.
        visual: (B, L) bool, visual tokens.
        source: (B, L) long, patch of each token, numbered over all images, -1 for none.
    """
    ends = to_device([sum(n for n, _, _ in cut.layout[: p + 1]) for p in range(len(cut.layout))], source)  # in crops
    crop = source.clamp(min=0) // (cut.grid[0] * cut.grid[1])
    image = torch.bucketize(crop, ends, right=True).masked_fill(~visual | (source < 0), -1)  # (B, L)
    hit = image[:, None] == torch.arange(len(cut.layout), device=source.device)[:, None]  # (B, P, L)
    return hit.to(torch.int8).argmax(2).masked_fill(~hit.any(2), -1)


def by_canvas(cut: VisionTokens) -> bool:
    """Return whether the host needs the patch of each token to order the tokens."""
    return cut.by_canvas and any(n > 1 for n, _, _ in cut.layout)


def place_tokens(
    cut: VisionTokens, visual: Tensor, source: Tensor, first: Sequence[Sequence[int]], ids: Tensor | None
) -> Placed:
    """Place the tokens of each image at the position of its first token; does not synchronise with the device.

    Args:
        cut: the tokens of all images.
        visual: (B, L) bool, visual tokens.
        source: (B, L) long, patch of each token, numbered over all images, -1 for none.
        first: the result of `first_positions` on the host.
        ids: `cut.ids` on the host; None if the order of the tokens does not depend on it.
    """
    patches = cut.grid[0] * cut.grid[1]
    order = _orders(cut, ids)
    index, after = [], []
    for places in first:
        mine = sorted((c, p) for p, c in enumerate(places) if c >= 0)
        index.append(list(chain.from_iterable(order[p] for _, p in mine)))
        after.append(list(chain.from_iterable([c] * len(order[p]) for c, p in mine)))
    counts = [len(x) for x in index]
    where, follows = (to_device([[*x, *[0] * (max(counts) - len(x))] for x in xs], visual) for xs in (index, after))
    total = sum(n for n, _, _ in cut.layout) * patches
    there = visual & (source >= 0)
    numbers = source.new_full((total + 1,), MERGED)  # patch -> visual token; beams write equal values
    numbers[source.masked_fill(~there, total)] = visual.cumsum(1) - 1
    patch = cut.ids.to(visual.device).flatten()[where]
    found = numbers[where // cut.ids.shape[1] * patches + patch.clamp(min=0)]
    return Placed(where, follows, found.masked_fill(patch < 0, MERGED), counts)


def vision_members(
    groups: Callable[[], Tensor], source: Tensor, visual: Tensor, placed: Placed, width: int
) -> tuple[Tensor, Tensor]:
    """Return the result of `Cut.members` for the tokens of a vision cut.

    Args:
        groups: see `VisionTokens`.
        source: (B, L) long, patch at each position, numbered over all images, -1 for none.
        visual: (B, L) bool, visual tokens.
        placed: the tokens of the batch.
        width: K, tokens of an image.
    """
    token, source, visual, index = groups().cpu(), source.cpu(), visual.cpu(), placed.index.cpu()
    first = torch.arange(token.shape[0])[:, None] * width
    token = torch.where(token >= 0, token + first, -1).flatten()  # (N T) patch -> token of the request
    mine = token[source.clamp(min=0)].masked_fill(~visual | (source < 0), -1)  # (B, L)
    return torch.arange(mine.shape[1]).expand_as(mine), places_among(mine, index, placed.counts)


def places_among(numbers: Tensor, index: Tensor, counts: Sequence[int]) -> Tensor:
    """Look up each number of (B, L) `numbers` among the first counts[b] entries of (B, K) `index`.

    Returns:
        (B, L) long, the position in `index`, -1 if the number is not there.
    """
    out = torch.full_like(numbers, -1)
    for row, count in enumerate(counts):
        hit = numbers[row, :, None] == index[row, :count]  # (L, count)
        out[row] = torch.where(hit.any(1), hit.to(torch.int8).argmax(1), -1)
    return out


def _orders(cut: VisionTokens, ids: Tensor | None) -> list[list[int]]:
    """Return the tokens of each image in the order in which they enter the language model."""
    width, start, out = cut.ids.shape[1], 0, []
    for crops, rows, columns in cut.layout:
        each = [range(c * width, c * width + cut.counts[c]) for c in range(start, start + crops)]
        out.append(list(chain.from_iterable(each)))
        if ids is not None and rows * columns:
            keys = [_canvas_key(ids[start + c, : len(some)], c, cut.grid, columns) for c, some in enumerate(each)]
            out[-1] = torch.tensor(out[-1])[torch.cat(keys).sort(stable=True).indices].tolist()
        start += crops
    return out


def _canvas_key(ids: Tensor, crop: int, grid: tuple[int, int], columns: int) -> Tensor:
    """Return a sort key for a crop's tokens.

    The order is: the whole image, the patches of the stitched canvas, tokens before the patches of their crop, tokens
    after them.
    """
    if crop == 0:
        return torch.arange(len(ids)) - (1 << 40)
    height, width = grid
    down, right = divmod(crop - 1, columns)
    y, x = down * height + ids // width, right * width + ids % width
    seen = (ids >= 0).cumsum(0) > 0
    loose = torch.where(seen, 1 << 50, 1 << 40)  # the sort is stable, so equal keys stay in crop order
    return torch.where(ids >= 0, y * columns * width + x, loose)


def patch_table(images: ImageState, visual: Tensor, source: Tensor | None, width: int) -> dict[str, Tensor]:
    """Return patch values by original visual index: name -> (B, V), 0 for a token without a patch."""
    if not images.patch_values or source is None:
        return {}
    order = true_first(visual)[:, :width]
    real = visual.gather(1, order)
    patch = source.gather(1, order).masked_fill(~real, -1)  # (B, V)
    out = {}
    for name, values in images.patch_values.items():
        flat = values.flatten().to(patch.device)
        out[name] = flat[patch.clamp(min=0)].masked_fill(patch < 0, 0)
    return out


def gather_by_cut(values: Tensor, cut: Cut, fill: Tensor | int) -> Tensor:
    """Gather per-token values (B, L) by a cut to (B, L'); merged tokens get `fill`, a number or (B, 1 or C)."""
    if cut.merged is not None:
        extra = cut.merged.shape[1]
        if isinstance(fill, int):
            values = torch.nn.functional.pad(values, (0, extra), value=fill)
        else:
            values = torch.cat([values, fill.expand(-1, extra)], 1)
    return values.gather(1, cut.index)


def gather_ids_by_cut(ids: Tensor, cut: Cut, merged: Tensor | int = MERGED) -> tuple[Tensor, Tensor]:
    """Return original indices and visual mask, (B, L') each, after a cut; `merged` are the indices of merged tokens."""
    ids = gather_by_cut(ids, cut, merged)
    if cut.valid is not None:
        ids = ids.masked_fill(~cut.valid, PADDING)
    return ids, ids > PADDING


def check_cut(cut: Cut, visual: Tensor, valid: Tensor) -> None:
    """Verify that a cut keeps every text token once and in order; synchronises, for debugging and tests.

    Raises:
        ValueError: if a text token is missing, repeated or out of order, or if any token is repeated.
    """
    length = visual.shape[1]
    for b in range(visual.shape[0]):
        index = cut.index[b] if cut.valid is None else cut.index[b][cut.valid[b]]
        index = index[index < length]
        got = index[~visual[b][index]]
        want = torch.arange(length, device=index.device)[valid[b] & ~visual[b]]
        if got.shape != want.shape or not bool((got == want).all()):
            raise ValueError(f"sample {b}: a cut must keep each text token once and in order")
        if index.unique().numel() != index.numel():
            raise ValueError(f"sample {b}: a cut repeats a token")
