"""Between vision tower and language model: rows of the tower, `reduce`, and what goes on in place of the patches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from ..core.select import take
from ..core.types import VisionCut, VisionView
from .request import SIZES, VISION, Rows, Vision
from .rows import Tap, vision_rows
from .tower import Tower, merges_of, merging_block, variant_of


@contextmanager
def image_sizes(sizes: list[tuple[int, int]] | None) -> Iterator[None]:
    """Tell methods the (width, height) of the pictures before padding, in the order of the pixel values.

    LLaVA's own classes pass them as `image_sizes`; with transformers' Llava wrap generate() in this. Without them
    no patch counts as padding.
    """
    token = SIZES.set(sizes)
    try:
        yield
    finally:
        SIZES.reset(token)


def padding_mask(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Patches more than about one patch outside a picture that was padded to a square.

    Source: official evaluation code. S is the longer side, b = floor((S + 23) / 24) pixels of border stay
    unmasked; cell i reads pixel floor(i S / 24) (24 being the grid's side).

    Args:
        size: (width, height) of the picture.
        grid: (rows, columns) of patches, equal numbers.

    Returns:
        (rows, columns) bool, True on padding.
    """
    width, height = int(size[0]), int(size[1])
    side, cells = max(width, height), grid[0]
    if width <= 0 or height <= 0:
        raise ValueError(f"image size {size!r}: width and height must be positive")
    mask = torch.zeros(grid, dtype=torch.bool)
    if width == height:
        return mask
    border = (side + cells - 1) // cells
    gap = abs(width - height) // 2
    low, high = max(gap - border, 0), min((width + height) // 2 + border, side)
    pixel = torch.arange(cells) * side // cells
    outside = (pixel < low) | (pixel >= high)
    return outside[:, None].expand(grid).clone() if width > height else outside[None].expand(grid).clone()


def batch_padding(sizes: list[tuple[int, int]] | None, n: int, grid: tuple[int, int]) -> Tensor | None:
    """(N, T) bool of `padding_mask`, or None when sizes are unknown or the features are crops of a larger picture."""
    if sizes is None or len(sizes) != n or grid[0] != grid[1]:
        return None
    return torch.stack([padding_mask(s, grid).flatten() for s in sizes])


class Door:
    """Hooks on the tower's blocks and on the projector. One instance an attachment; holds no request state."""

    def __init__(self, method: Method, tower: Tower, pads: bool) -> None:
        self.method = method
        self.where = tower
        self.rows = method.vision_rows(tower.feature_layer)
        self.merges = merges_of(method, tower)
        self.variant = variant_of(method, tower)
        self.pads = pads
        self.acts = type(method).reduce is not Method.reduce
        late = [b for b in self.rows if not 0 <= b < tower.depth]
        if late:
            raise ValueError(
                f"{method!r} reads block {late[0]} of the vision tower, with {tower.depth} blocks and its features "
                f"behind block {tower.feature_layer}; the checkpoint must take its features further down"
            )
        if tower.crops > 1 and not method.anyres:
            raise ValueError(
                f"{method.name or method!r} cannot work on pictures in crops (LLaVA-NeXT's anyres); use a checkpoint "
                "that sees pictures whole, or another method"
            )

    def install(self, module: Any, blocks: Any, projector: Any) -> list[Callable[[], None]]:
        """Put all hooks in place; returns the undo steps."""
        undo: list[Callable[[], None]] = [module.register_forward_pre_hook(self.start).remove]
        for block in self.rows:
            tap = functools.partial(_tap, block, self.rows[block])
            undo.append(blocks[block].register_forward_pre_hook(tap, with_kwargs=True).remove)
        if self.rows:
            undo.append(blocks[self.where.feature_layer].register_forward_hook(_class_token).remove)
        for block, count in enumerate(self.merges):
            before = blocks[block].__dict__.get("forward")
            stock = before or type(blocks[block]).forward.__get__(blocks[block])
            merging = functools.partial(merging_block, blocks[block], stock, self.method, count, block == 0)
            blocks[block].forward = merging
            undo.append(functools.partial(_restore, blocks[block], before))
        undo.append(projector.register_forward_pre_hook(self.reduce).remove)
        undo.append(projector.register_forward_hook(self.stand_in).remove)
        return undo

    def start(self, module: Any = None, args: Any = None) -> None:
        """Tower pre-hook: forget the pictures of the request before."""
        VISION.set(Vision(sizes=SIZES.get(), variant=self.variant))

    def reduce(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Projector pre-hook: ask the method."""
        vision = VISION.get()
        if vision is None or not (self.acts or self.merges):
            return None
        features: Tensor = args[0]
        grid = self.where.grid
        patches = vision.merging[0].size.shape[1] - 1 if vision.merging else grid[0] * grid[1]
        if features.shape[1] != patches:
            raise ValueError(
                f"the projector got {features.shape[1]} features a picture, the grid has {grid[0]} x "
                f"{grid[1]}; feature selection must be 'patch' ('default' in transformers)"
            )
        answer = self.method.reduce(self._view(vision, features))
        merged, vision.taps, vision.cls, vision.merging = bool(vision.merging), {}, None, []
        if answer is None:
            if merged:
                raise ValueError(f"{self.method!r} merges in the tower, so its reduce must say what the rows are")
            return None
        features, ids, counts = compact(answer, patches)
        vision.cut = Rows(features, ids, counts, grid, answer.canvas, answer.ids is None, [(1, 0, 0)] * len(counts))
        return (features,)

    def _view(self, vision: Vision, features: Tensor) -> VisionView:
        padding = batch_padding(vision.sizes, features.shape[0], self.where.grid) if self.pads else None
        there, taps = features.device, {b: vision.taps[b] for b in self.rows}  # a memo brings those of other methods
        view = VisionView(
            features,
            {b: t.probs.to(there) for b, t in taps.items()},
            {b: t.keys for b, t in taps.items()},
            None if padding is None else padding.to(there, non_blocking=True),
            self.where.grid,
            {b: t.queries for b, t in taps.items()},
            None if vision.cls is None else vision.cls.to(there),
            torch.cat([m.groups for m in vision.merging])[:, 1:].to(there) - 1 if vision.merging else None,
            self.where.crops,
            self.where.feature_layer,
        )
        vision.carry = view.carry
        return view

    def stand_in(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """Projector hook: keep the real rows, hand the package as many as it has places for."""
        vision = VISION.get()
        if vision is None or vision.cut is None:
            return None
        vision.cut.embeds = output
        return output.new_zeros(output.shape[0], self.where.grid[0] * self.where.grid[1], output.shape[2])


def compact(cut: VisionCut, patches: int) -> tuple[Tensor, Tensor, list[int]]:
    """Features (N, K', Dv) and patches (N, K') of the live rows, and how many each picture has.

    One read, unless the cut brings its counts.

    Raises:
        ValueError: for shapes that do not fit.
    """
    n, k = cut.live.shape
    if cut.features.shape[:2] != (n, k) or (cut.ids is None and k != patches):
        raise ValueError(
            f"VisionCut: live is {(n, k)}, features {tuple(cut.features.shape)}; without ids give {patches} rows"
        )
    ids = torch.arange(k, device=cut.live.device).expand(n, k) if cut.ids is None else cut.ids
    counts = cut.live.sum(1).tolist() if cut.counts is None else list(cut.counts)
    if len(counts) != n:
        raise ValueError(f"VisionCut: {len(counts)} counts for {n} pictures or crops")
    if all(c == k for c in counts):
        return cut.features, ids, counts
    order = (~cut.live).to(torch.int8).sort(dim=1, stable=True).indices[:, : max(*counts, 1)]
    return take(cut.features, order), ids.gather(1, order), counts


def _restore(owner: Any, before: Any) -> None:
    if before is None:
        owner.__dict__.pop("forward", None)
    else:
        owner.forward = before


def _tap(block: int, rows: list[int], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Block pre-hook: the rows a method wants."""
    vision = VISION.get()
    if vision is None:
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    tap = vision_rows(module, hidden.detach(), rows)
    if block in vision.taps:  # LLaVA runs a list of pictures one by one
        tap = Tap.joined([vision.taps[block], tap], torch.cat)
    vision.taps[block] = tap


def _class_token(module: Any, args: Any, output: Any) -> None:
    """Hook of the feature block: the class token's feature, which the packages throw away."""
    vision = VISION.get()
    if vision is None:
        return
    cls = (output[0] if isinstance(output, tuple) else output)[:, 0].detach()
    vision.cls = cls if vision.cls is None else torch.cat([vision.cls, cls])
