"""Which row stands where in the sequences of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.types import MERGED, Cut
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
    real = torch.arange(width, device=cut.ids.device) < torch.tensor(cut.counts, device=cut.ids.device)[:, None]
    table = torch.full((n, patches + 1), -1, dtype=torch.long, device=cut.ids.device)
    table = table.scatter(1, cut.ids.masked_fill(~real, patches), slots)[:, :patches].flatten().to(source.device)
    row = table[source.clamp(min=0)].masked_fill(source < 0, -1)
    return row, (row >= 0) | (source < 0)


def lay_out(cut: Rows, visual: Tensor, source: Tensor) -> Placed:
    """Find each picture's first column and put its rows there; one read from the device, two with crops.

    Args:
        cut: the rows of all pictures.
        visual: (B, L) bool.
        source: (B, L) long, patch behind each token, counted over all pictures, -1 for none.
    """
    device = visual.device
    patches = cut.grid[0] * cut.grid[1]
    crops = [n for n, _, _ in cut.pictures]
    starts = [sum(crops[:p]) for p in range(len(crops))]
    owner = torch.repeat_interleave(torch.arange(len(crops)), torch.tensor(crops)).to(device)  # crop -> picture
    there = visual & (source >= 0)
    picture = owner[(source.clamp(min=0) // patches)].masked_fill(~there, -1)  # (B, L)
    hit = picture[:, None] == torch.arange(len(crops), device=device)[:, None]  # (B, P, L)
    column = hit.to(torch.int8).argmax(2).masked_fill(~hit.any(2), -1).tolist()
    order = _orders(cut, starts)
    index, at, counts = [], [], []
    for columns in column:
        mine = sorted((c, p) for p, c in enumerate(columns) if c >= 0)
        index.append(torch.cat([order[p] for _, p in mine]) if mine else torch.zeros(0, dtype=torch.long))
        at.append(torch.cat([torch.full_like(order[p], c) for c, p in mine]) if mine else torch.zeros(0).long())
        counts.append(index[-1].numel())
    where = torch.nn.utils.rnn.pad_sequence(index, batch_first=True).to(device)
    behind = torch.nn.utils.rnn.pad_sequence(at, batch_first=True).to(device)
    total = sum(crops) * patches
    numbers = torch.full((total + 1,), MERGED, device=device)  # patch -> visual token; beams write the same twice
    numbers[source.masked_fill(~there, total)] = visual.cumsum(1) - 1
    rows = cut.ids.to(device).flatten()[where]
    ids = numbers[where // cut.ids.shape[1] * patches + rows.clamp(min=0)]
    return Placed(where, behind, ids.masked_fill(rows < 0, MERGED), counts)


def _orders(cut: Rows, starts: list[int]) -> list[Tensor]:
    """The rows of each picture in the order they are sent, on the host."""
    width = cut.ids.shape[1]
    host = cut.ids.cpu() if any(n > 1 for n, _, _ in cut.pictures) and cut.canvas else None
    out = []
    for (crops, rows, columns), start in zip(cut.pictures, starts, strict=True):
        each = [torch.arange(cut.counts[start + c]) + (start + c) * width for c in range(crops)]
        if host is None or not rows * columns:
            out.append(torch.cat(each))
            continue
        key = torch.cat([_canvas_key(host[start + c, : len(each[c])], c, cut.grid, columns) for c in range(crops)])
        out.append(torch.cat(each)[key.sort(stable=True).indices])
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
