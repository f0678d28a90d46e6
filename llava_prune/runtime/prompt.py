"""The prompt that enters the language model, and the integers that the host needs (at most one synchronisation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import by_canvas, first_positions, in_place
from .state import HostPrompts, ImageState, Splice, VisionTokens

LENGTHS = 5
"""Number of host integers of a sample: visual tokens, other tokens, tokens after the image, gaps, top position + 1."""


@dataclass
class Prompt:
    """Tokens of a prompt (B samples, L positions) before the first layer.

    Attributes:
        images: the images of the prompt.
        visual: (B, L) bool, visual tokens.
        valid: (B, L) bool, False on padding.
        positions: (B, L) long, position ids.
        source: (B, L) long, see Splice.
        n_visual: number of visual tokens of each sample.
        n_other: number of other tokens of each sample, without padding.
        n_text: largest number of tokens after the last visual token, at least 1.
        least_text: smallest number of tokens after the last visual token among samples with an image.
        gaps: whether there is padding anywhere but at the left end.
        top: largest position id + 1.
        first: first position of each image in each sample, -1 if the sample does not contain it; see
            `first_positions`. Set only for tokens with `ids`.
        ids: (N, K) long on the host, the patch of each token; set only for tokens that are ordered by canvas.
        pad: (1, 1) long, number of masked positions at the left end that count as text, see `padded`.
        token, live: the result of `in_place`; set only for packed tokens.
        left: number of visual tokens that remain in each sample; set only for packed tokens.
    """

    images: ImageState
    visual: Tensor
    valid: Tensor
    positions: Tensor
    source: Tensor | None
    n_visual: tuple[int, ...] = ()
    n_other: tuple[int, ...] = ()
    n_text: int = 1
    least_text: int = 0
    gaps: bool = False
    top: int = 0
    first: Sequence[Sequence[int]] = ()
    ids: Tensor | None = None
    pad: Tensor | None = None
    token: Tensor | None = None
    live: Tensor | None = None
    left: tuple[int, ...] = ()

    @property
    def full(self) -> bool:
        """Whether there is no padding at all."""
        return all(n + c == self.visual.shape[1] for n, c in zip(self.n_visual, self.n_other, strict=True))


def after_image(visual: Tensor, valid: Tensor) -> Tensor:
    """Return (B, L) bool: the tokens after the last visual token of each sample that has one."""
    places = torch.arange(1, visual.shape[1] + 1, device=visual.device)
    last = (visual * places).amax(1, keepdim=True)  # (B, 1), 1-based, 0 for a sample without visual tokens
    return valid & (places > last) & (last > 0)


def padded(prompt: Prompt, extra: int) -> Prompt:
    """Return the prompt of one sample with `extra` masked positions before it, which no token attends to.

    Unlike padding, these positions count as text tokens, which every cut keeps. Prompts of different text lengths thus
    get the same shapes.
    """
    left = (extra, 0)
    return replace(
        prompt,
        visual=pad(prompt.visual, left),
        valid=pad(prompt.valid, left, value=True),
        positions=pad(prompt.positions, left),
        source=None if prompt.source is None else pad(prompt.source, left, value=-1),
        n_other=tuple(n + extra for n in prompt.n_other),
        n_text=prompt.n_text + extra,
        top=prompt.top + extra,
        pad=prompt.positions.new_full((1, 1), extra),
    )


def check_shapes(batch: int, length: int, mask: Tensor | None, position_ids: Tensor | None = None) -> None:
    """Refuse an attention mask or position ids that do not fit a prompt of B samples and L positions.

    Raises:
        ValueError: with both shapes.
    """
    fits = {"attention_mask": (mask, [(batch, length)]), "position_ids": (position_ids, [(1, length), (batch, length)])}
    for name, (values, shapes) in fits.items():
        if values is not None and tuple(values.shape) not in shapes:
            counted = " (generate() counts them from attention_mask)" if name == "position_ids" else ""
            raise ValueError(
                f"{name} has the shape {tuple(values.shape)}{counted} and the prompt {(batch, length)}; give it the "
                "shape of the prompt, or leave it out where nothing is padded"
            )


def read_prompt(
    splice: Splice,
    batch: int,
    length: int,
    device: torch.device,
    mask: Tensor | None,
    position_ids: Tensor | None,
    known: HostPrompts | None = None,
) -> Prompt:
    """Collect everything about a prompt that the prefill needs before the first layer.

    This takes one synchronisation with the device for any method, and none if the prompts are `known` on the host.

    Args:
        splice: positions of the visual tokens.
        batch: B, number of samples.
        length: L, number of token positions.
        device: device of the prompt.
        mask: attention mask, or None.
        position_ids: position ids, or None for consecutive ones.
        known: token ids on the host, or None.

    Raises:
        ValueError: if the shape of the splice does not fit the prompt.
    """
    visual = splice.visual.to(device)
    source = None if splice.source is None else splice.source.to(device)
    if visual.shape[0] != batch and batch % visual.shape[0] == 0:  # beams repeat the spliced embeddings
        times = batch // visual.shape[0]
        visual = visual.repeat_interleave(times, 0)
        source = None if source is None else source.repeat_interleave(times, 0)
    if visual.shape != (batch, length):
        raise ValueError(
            f"the images were placed in a prompt of shape {tuple(visual.shape)}, and the language model got one of "
            f"{(batch, length)}; pass input_ids and images to generate() or forward() unchanged"
        )
    valid = torch.ones_like(visual) if mask is None else mask[:, -length:].to(device).bool()
    if position_ids is None:  # as the stock forward numbers them, padding included
        position_ids = torch.arange(length, device=device)[None]
    positions = position_ids.to(device).long().expand(batch, -1)
    prompt = Prompt(splice.images, visual & valid, valid, positions, source)
    cut = splice.images.tokens if source is not None else None
    if cut is not None and cut.packed:
        assert source is not None
        prompt.token, prompt.live = in_place(cut, source)
    table = None if known is None or prompt.live is not None else _table(known, batch, length, cut)
    _fill(prompt, _read(prompt, cut) if table is None else table, cut)
    return prompt


def _read(prompt: Prompt, cut: VisionTokens | None) -> list[list[int]]:
    """Read the host integers of each sample from the device.

    Returns:
        One list for each sample: LENGTHS integers, then the entry of `left` or those of `first`. Sets `prompt.ids` as
        well if the order of the tokens depends on it.
    """
    visual, valid = prompt.visual, prompt.valid
    gap = (valid[:, :-1] & ~valid[:, 1:]).any(1)
    top = prompt.positions.amax(1) + 1
    lengths = [visual.sum(1), (valid & ~visual).sum(1), after_image(visual, valid).sum(1), gap.long(), top]
    table = torch.stack(lengths, 1)  # (B, LENGTHS)
    if cut is not None and prompt.live is not None:
        table = torch.cat([table, (visual & prompt.live).sum(1, keepdim=True)], 1)
    elif cut is not None and prompt.source is not None:
        table = torch.cat([table, first_positions(cut, visual, prompt.source)], 1)
    width, batch = table.shape[1], table.shape[0]
    flat = table.flatten()
    canvas = cut.ids if cut is not None and prompt.live is None and by_canvas(cut) else None
    if canvas is not None:
        flat = torch.cat([flat, canvas.flatten().to(flat.device)])
    values = flat.tolist()
    if canvas is not None:
        prompt.ids = torch.tensor(values[batch * width :]).view(canvas.shape)
    return [values[b * width : (b + 1) * width] for b in range(batch)]


def _fill(prompt: Prompt, table: list[list[int]], cut: VisionTokens | None) -> None:
    prompt.n_visual, prompt.n_other, after, gaps, top = (
        tuple(x) for x in zip(*(r[:LENGTHS] for r in table), strict=True)
    )
    prompt.n_text, prompt.gaps, prompt.top = max(1, *after), any(gaps), max(top)
    prompt.least_text = min((n for n, v in zip(after, prompt.n_visual, strict=True) if v), default=0)
    if cut is not None and prompt.live is not None:
        prompt.left = tuple(row[LENGTHS] for row in table)
    elif cut is not None:
        prompt.first = [row[LENGTHS:] for row in table]


def _table(known: HostPrompts, batch: int, length: int, cut: VisionTokens | None) -> list[list[int]] | None:
    """Compute the result of `_read` from the token ids on the host; None if they do not fit the request."""
    layout = [] if cut is None else cut.layout
    named = [row.count(known.image) for row in known.rows]
    widths = [len(row) + n * (known.patches - 1) for row, n in zip(known.rows, named, strict=True)]
    if max(widths) != length or batch % len(widths) or any(crops > 1 for crops, _, _ in layout):
        return None
    with_blanks = sum(max(n, 1) for n in named)  # package llava takes one image for every prompt without an image
    if layout and len(layout) not in (sum(named), with_blanks):  # older transformers encode the images for every beam
        return None
    blanks = len(layout) > sum(named)
    out, image = [], 0
    for row, n, width in zip(known.rows, named, widths, strict=True):
        first, at = [-1] * len(layout), -1
        for i in range(n):
            at = row.index(known.image, at + 1)
            if layout:
                first[image + i] = length - width + at + i * (known.patches - 1)
        image += max(n, 1) if blanks else n
        out.append([n * known.patches, len(row) - n, len(row) - 1 - at if n else 0, 0, length, *first])
    times = batch // len(widths)  # beam search repeats each prompt
    return [line for line in out for _ in range(times)]
