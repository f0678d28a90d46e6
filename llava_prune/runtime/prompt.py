"""A prompt as the language model gets it, and what the host has to know of it: one read from the device, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import by_canvas, first_columns, in_place
from .request import PROMPTS, Known, Pending, Rows

LENGTHS = 5
"""Host integers of a sample: visual tokens, other live rows, those behind the picture, gaps, largest position + 1."""


@dataclass
class Prompt:
    """Rows of a prompt (B samples, L columns) before the first layer.

    Attributes:
        visual: (B, L) bool, live visual tokens.
        valid: (B, L) bool, no padding.
        positions: (B, L) long.
        source: (B, L) long, see Pending.
        n_visual: visual tokens of each sample.
        counts: other live rows of each sample.
        n_text: the most live rows behind the last visual token, at least 1.
        gaps: whether padding stands anywhere but at the left end.
        top: the largest position + 1.
        columns: first column of each picture in each sample, -1 where it is not there; rows to lay out only.
        ids: (N, K) long on the host, patches behind rows that are laid on a canvas.
        pad: (1, 1) long, masked rows at the left end that count as text, see `padded`.
        row, live, left: see `in_place`, with the visual tokens it leaves in each sample; packed rows only.
    """

    visual: Tensor
    valid: Tensor
    positions: Tensor
    source: Tensor | None
    n_visual: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    n_text: int = 1
    gaps: bool = False
    top: int = 0
    columns: Sequence[Sequence[int]] = ()
    ids: Tensor | None = None
    pad: Tensor | None = None
    row: Tensor | None = None
    live: Tensor | None = None
    left: tuple[int, ...] = ()

    @property
    def full(self) -> bool:
        """Whether there is no padding at all."""
        return all(n + c == self.visual.shape[1] for n, c in zip(self.n_visual, self.counts, strict=True))


def behind(visual: Tensor, valid: Tensor) -> Tensor:
    """(B, L) bool: live rows after the last visual token of a sample that has one."""
    places = torch.arange(1, visual.shape[1] + 1, device=visual.device)
    last = (visual * places).amax(1, keepdim=True)  # (B, 1), 1-based, 0 without picture
    return valid & (places > last) & (last > 0)


def padded(prompt: Prompt, extra: int) -> Prompt:
    """The prompt of one sample behind `extra` rows that every cut keeps and no row attends to.

    Unlike padding they count as rows: what follows has the same shapes for every length of text that they make up for.
    """
    left = (extra, 0)
    return replace(
        prompt,
        visual=pad(prompt.visual, left),
        valid=pad(prompt.valid, left, value=True),
        positions=pad(prompt.positions, left),
        source=None if prompt.source is None else pad(prompt.source, left, value=-1),
        counts=tuple(n + extra for n in prompt.counts),
        n_text=prompt.n_text + extra,
        top=prompt.top + extra,
        pad=prompt.positions.new_full((1, 1), extra),
    )


def read_prompt(
    pending: Pending, batch: int, length: int, device: torch.device, mask: Tensor | None, position_ids: Tensor | None
) -> Prompt:
    """Everything about a prompt that the loop needs before the first layer.

    One read from the device, whatever the method sends; none when `Loaded.generate` brought the prompts.

    Raises:
        ValueError: when the pictures do not fit the prompt.
    """
    visual = pending.visual.to(device)
    source = None if pending.source is None else pending.source.to(device)
    if visual.shape[0] != batch and batch % visual.shape[0] == 0:  # beams repeat the spliced embeddings
        times = batch // visual.shape[0]
        visual = visual.repeat_interleave(times, 0)
        source = None if source is None else source.repeat_interleave(times, 0)
    if visual.shape != (batch, length):
        raise ValueError(f"pictures were spliced into {tuple(visual.shape)} tokens, not {(batch, length)}")
    valid = torch.ones_like(visual) if mask is None else mask[:, -length:].to(device).bool()
    if position_ids is None:  # as the stock forward numbers them, padding included
        position_ids = torch.arange(length, device=device)[None]
    prompt = Prompt(visual & valid, valid, position_ids.to(device).long().expand(batch, -1), source)
    cut = pending.cut if source is not None else None
    if cut is not None and cut.packed:
        assert source is not None
        prompt.row, prompt.live = in_place(cut, source)
    known = PROMPTS.get()
    table = None if known is None or prompt.live is not None else _table(known, batch, length, cut)
    _fill(prompt, _read(prompt, cut) if table is None else table, cut)
    return prompt


def _read(prompt: Prompt, cut: Rows | None) -> list[list[int]]:
    """Host integers of each sample: LENGTHS of them, then `left` or the first columns; `ids` as well. One read."""
    visual, valid = prompt.visual, prompt.valid
    gap = (valid[:, :-1] & ~valid[:, 1:]).any(1)
    top = prompt.positions.amax(1) + 1
    lengths = [visual.sum(1), (valid & ~visual).sum(1), behind(visual, valid).sum(1), gap.long(), top]
    table = torch.stack(lengths, 1)  # (B, LENGTHS)
    if cut is not None and prompt.live is not None:
        table = torch.cat([table, (visual & prompt.live).sum(1, keepdim=True)], 1)
    elif cut is not None and prompt.source is not None:
        table = torch.cat([table, first_columns(cut, visual, prompt.source)], 1)
    width, batch = table.shape[1], table.shape[0]
    canvas = cut is not None and prompt.live is None and by_canvas(cut)
    flat = table.flatten()
    if canvas:
        assert cut is not None
        flat = torch.cat([flat, cut.ids.flatten().to(flat.device)])
    values = flat.tolist()
    if canvas:
        assert cut is not None
        prompt.ids = torch.tensor(values[batch * width :]).view(cut.ids.shape)
    return [values[b * width : (b + 1) * width] for b in range(batch)]


def _fill(prompt: Prompt, table: list[list[int]], cut: Rows | None) -> None:
    prompt.n_visual, prompt.counts, after, gaps, top = (
        tuple(x) for x in zip(*(r[:LENGTHS] for r in table), strict=True)
    )
    prompt.n_text, prompt.gaps, prompt.top = max(1, *after), any(gaps), max(top)
    if cut is not None and prompt.live is not None:
        prompt.left = tuple(row[LENGTHS] for row in table)
    elif cut is not None:
        prompt.columns = [row[LENGTHS:] for row in table]


def _table(known: Known, batch: int, length: int, cut: Rows | None) -> list[list[int]] | None:
    """What `_read` reads, from the prompts' ids; None where they are not those of the request."""
    pictures = [] if cut is None else cut.pictures
    named = [row.count(known.image) for row in known.rows]
    widths = [len(row) + n * (known.patches - 1) for row, n in zip(known.rows, named, strict=True)]
    if max(widths) != length or batch % len(widths) or any(crops > 1 for crops, _, _ in pictures):
        return None
    blanks = len(pictures) > sum(named)  # package llava takes a picture for every prompt without one
    out, first = [], 0
    for row, n, width in zip(known.rows, named, widths, strict=True):
        columns, at = [-1] * len(pictures), -1
        for i in range(n):
            at = row.index(known.image, at + 1)
            if pictures:
                columns[first + i] = length - width + at + i * (known.patches - 1)
        first += max(n, 1) if blanks else n
        out.append([n * known.patches, len(row) - n, len(row) - 1 - at if n else 0, 0, length, *columns])
    times = batch // len(widths)  # beams
    return [line for line in out for _ in range(times)]
