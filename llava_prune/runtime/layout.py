"""Which row stands where in the sequences of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..core.select import column, sent
from ..core.types import FILLER, MERGED, Cut
from .request import Pending, Rows


@dataclass
class Placed:
    """Rows of a batch of B samples, C being the most that one has.

    Attributes:
        index: (B, C) long into all rows (N x K) of the request.
        at: (B, C) long, the column that each row follows.
        ids: (B, C) long, the visual token of the unpruned sequence that shows the row's patch; MERGED for none.
        counts: rows of each sample.
    """

    index: Tensor
    at: Tensor
    ids: Tensor
    counts: list[int]


def in_place(cut: Rows, source: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are patches, where the package has put these: (B, L) long row of each column, (B, L) bool columns left.

    Columns without a patch (text, newline tokens) are left and have row -1.
    """
    n, width = cut.ids.shape
    patches = cut.grid[0] * cut.grid[1]
    slots = torch.arange(n * width, device=cut.ids.device).view(n, width)
    real = torch.arange(width, device=cut.ids.device) < column(cut.counts, cut.ids)
    table = torch.full((n, patches + 1), -1, dtype=torch.long, device=cut.ids.device)
    table = table.scatter(1, cut.ids.masked_fill(~real, patches), slots)[:, :patches].flatten().to(source.device)
    row = table[source.clamp(min=0)].masked_fill(source < 0, -1)
    return row, (row >= 0) | (source < 0)


def first_columns(cut: Rows, visual: Tensor, source: Tensor) -> Tensor:
    """(B, P) long: the first column of each picture in each sample, -1 where it is not there.

    Args:
        cut: the rows of all pictures.
        visual: (B, L) bool.
        source: (B, L) long, patch behind each token, counted over all pictures, -1 for none.
    """
    ends = sent([sum(n for n, _, _ in cut.pictures[: p + 1]) for p in range(len(cut.pictures))], source)  # in crops
    crop = source.clamp(min=0) // (cut.grid[0] * cut.grid[1])
    picture = torch.bucketize(crop, ends, right=True).masked_fill(~visual | (source < 0), -1)  # (B, L)
    hit = picture[:, None] == torch.arange(len(cut.pictures), device=source.device)[:, None]  # (B, P, L)
    return hit.to(torch.int8).argmax(2).masked_fill(~hit.any(2), -1)


def by_canvas(cut: Rows) -> bool:
    """Whether the host must know the patches behind the rows to order them."""
    return cut.canvas and any(n > 1 for n, _, _ in cut.pictures)


def lay_out(cut: Rows, visual: Tensor, source: Tensor, columns: Sequence[Sequence[int]], ids: Tensor | None) -> Placed:
    """Put each picture's rows behind its first column; no read from the device.

    Args:
        cut: the rows of all pictures.
        visual: (B, L) bool.
        source: (B, L) long, patch behind each token, counted over all pictures, -1 for none.
        columns: what `first_columns` says.
        ids: `cut.ids` on the host, None where their order does not depend on it.
    """
    patches = cut.grid[0] * cut.grid[1]
    order = _orders(cut, ids)
    index, at = [], []
    for places in columns:
        mine = sorted((c, p) for p, c in enumerate(places) if c >= 0)
        index.append(list(chain.from_iterable(order[p] for _, p in mine)))
        at.append(list(chain.from_iterable([c] * len(order[p]) for c, p in mine)))
    counts = [len(x) for x in index]
    where, behind = (sent([[*x, *[0] * (max(counts) - len(x))] for x in rows], visual) for rows in (index, at))
    total = sum(n for n, _, _ in cut.pictures) * patches
    there = visual & (source >= 0)
    numbers = source.new_full((total + 1,), MERGED)  # patch -> visual token; beams write the same twice
    numbers[source.masked_fill(~there, total)] = visual.cumsum(1) - 1
    rows = cut.ids.to(visual.device).flatten()[where]
    found = numbers[where // cut.ids.shape[1] * patches + rows.clamp(min=0)]
    return Placed(where, behind, found.masked_fill(rows < 0, MERGED), counts)


def _orders(cut: Rows, ids: Tensor | None) -> list[list[int]]:
    """The rows of each picture in the order they are sent."""
    width, start, out = cut.ids.shape[1], 0, []
    for crops, rows, columns in cut.pictures:
        each = [range(c * width, c * width + cut.counts[c]) for c in range(start, start + crops)]
        out.append(list(chain.from_iterable(each)))
        if ids is not None and rows * columns:
            keys = [_canvas_key(ids[start + c, : len(some)], c, cut.grid, columns) for c, some in enumerate(each)]
            out[-1] = torch.tensor(out[-1])[torch.cat(keys).sort(stable=True).indices].tolist()
        start += crops
    return out


def _canvas_key(ids: Tensor, crop: int, grid: tuple[int, int], columns: int) -> Tensor:
    """Sort key of a crop's rows: the whole picture, the stitched canvas, rows before the patches, rows behind."""
    if crop == 0:
        return torch.arange(len(ids)) - (1 << 40)
    height, width = grid
    down, right = divmod(crop - 1, columns)
    y, x = down * height + ids // width, right * width + ids % width
    seen = (ids >= 0).cumsum(0) > 0
    loose = torch.where(seen, 1 << 50, 1 << 40)  # crops come in turn: the sort is stable
    return torch.where(ids >= 0, y * columns * width + x, loose)


def carry(pending: Pending, visual: Tensor, source: Tensor | None, width: int) -> dict[str, Tensor]:
    """Patch values by original visual index: name -> (B, V), 0 where no patch is behind a token."""
    if not pending.carry or source is None:
        return {}
    order = (~visual).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    real = visual.gather(1, order)
    patch = source.gather(1, order).masked_fill(~real, -1)  # (B, V)
    out = {}
    for name, values in pending.carry.items():
        flat = values.flatten().to(patch.device)
        out[name] = flat[patch.clamp(min=0)].masked_fill(patch < 0, 0)
    return out


def moved(rows: Tensor, cut: Cut, fill: Tensor | int) -> Tensor:
    """(B, L') what the rows (B, L) of a batch have after a cut; merged ones get `fill`, a number or (B, 1 or C)."""
    if cut.merged is not None:
        extra = cut.merged.shape[1]
        if isinstance(fill, int):
            rows = torch.nn.functional.pad(rows, (0, extra), value=fill)
        else:
            rows = torch.cat([rows, fill.expand(-1, extra)], 1)
    return rows.gather(1, cut.index)


def moved_ids(ids: Tensor, cut: Cut, merged: Tensor | int = MERGED) -> tuple[Tensor, Tensor]:
    """Original indices and the visual mask, (B, L') each, after a cut whose merged rows have the indices `merged`."""
    ids = moved(ids, cut, merged)
    if cut.valid is not None:
        ids = ids.masked_fill(~cut.valid, FILLER)
    return ids, ids > FILLER


def check_cut(cut: Cut, visual: Tensor, valid: Tensor) -> None:
    """Every live row that is not visual is there once and in order (debug runs and tests; reads the device)."""
    length = visual.shape[1]
    for b in range(visual.shape[0]):
        index = cut.index[b] if cut.valid is None else cut.index[b][cut.valid[b]]
        index = index[index < length]
        got = index[~visual[b][index]]
        want = torch.arange(length, device=index.device)[valid[b] & ~visual[b]]
        if got.shape != want.shape or not bool((got == want).all()):
            raise ValueError(f"sample {b}: a cut must keep each text row once and in order")
        if index.unique().numel() != index.numel():
            raise ValueError(f"sample {b}: a cut repeats a row")
