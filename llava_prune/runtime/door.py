"""Between vision tower and language model: rows of the tower, `reduce`, and which patch is behind which token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from ..core.types import VisionView
from .request import SIZES, VISION, Vision
from .rows import vision_rows


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

    def __init__(self, method: Method, feature_layer: int, grid: tuple[int, int], pads: bool) -> None:
        self.method = method
        self.rows = method.vision_rows(feature_layer)
        self.grid = grid
        self.pads = pads

    def start(self, module: Any = None, args: Any = None) -> None:
        """Tower pre-hook: forget the pictures of the request before."""
        VISION.set(Vision(sizes=SIZES.get()))

    def tap(self, block: int) -> _Tap:
        """Pre-hook for encoder block `block`."""
        return _Tap(block, self.rows[block])

    def reduce(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Projector pre-hook: ask the method."""
        vision = VISION.get()
        if vision is None:
            return None
        features: Tensor = args[0]
        if self.rows and features.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"the projector got {features.shape[1]} features a picture, the grid has {self.grid[0]} x "
                f"{self.grid[1]}; feature selection must be 'patch' ('default' in transformers)"
            )
        padding = batch_padding(vision.sizes, features.shape[0], self.grid) if self.pads else None
        if padding is not None:
            padding = padding.to(features.device)
        probs = {k: p.to(features.device) for k, p in vision.probs.items()}
        view = VisionView(features, probs, vision.keys, padding, self.grid)
        answer = self.method.reduce(view)
        vision.carry, vision.probs, vision.keys = view.carry, {}, {}
        if answer is None:
            return None
        vision.live = answer.live
        return (answer.features,)


class _Tap:
    def __init__(self, block: int, rows: list[int]) -> None:
        self.block, self.rows = block, rows

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        vision = VISION.get()
        if vision is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        probs, keys = vision_rows(module, hidden.detach(), self.rows)
        if self.block in vision.probs:  # LLaVA runs a list of pictures one by one
            probs = torch.cat([vision.probs[self.block], probs])
            keys = torch.cat([vision.keys[self.block], keys])
        vision.probs[self.block], vision.keys[self.block] = probs, keys
