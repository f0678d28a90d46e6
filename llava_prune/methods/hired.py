"""HiRED: share a budget between an image and its tiles by class-token attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.selection import column, descending_rank, to_device
from ..ops.shares import proportional
from .base import Method, MethodInfo
from .checks import at_most_one, choice, integer, real
from .registry import register
from .views import ImageLayout, VisionCut, VisionView, per_crop


def tile_of_patch(layout: ImageLayout, grid: tuple[int, int], strict: bool = False) -> list[int]:
    """Return the tile that each patch of the whole image belongs to.

    Args:
        layout: layout of the image.
        grid: (rows, columns) of patches.
        strict: as in the official code, use equal runs of patches in raster order instead of the tiles' areas.

    Returns:
        T integers. A patch belongs to the tile that contains its centre; tiles cover the image and its padding.
    """
    height, width = grid
    if strict:
        return [patch * layout.rows * layout.columns // (height * width) for patch in range(height * width)]
    across, down = 1.0, 1.0  # shares of the tiles' width and height that the image covers
    if layout.size is not None:
        wider = layout.size[0] * layout.rows / (layout.size[1] * layout.columns)
        across, down = min(wider, 1.0), min(1 / wider, 1.0)
    rows = [int((0.5 + ((y + 0.5) / height - 0.5) * down) * layout.rows) for y in range(height)]
    columns = [int((0.5 + ((x + 0.5) / width - 0.5) * across) * layout.columns) for x in range(width)]
    return [row * layout.columns + c for row in rows for c in columns]


def select(first: Tensor, last: Tensor, budget: int, alpha: float, tiles: list[int], strict: bool = False) -> Tensor:
    """Choose the patches that remain of an image in crops.

    Args:
        first: (T,), attention of the class token in the first block on the whole image, sum over heads.
        last: (n, T), attention of the class token in the block whose output is the feature map; the whole image is the
            first crop.
        budget: number of tokens of all n crops together.
        alpha: share of the budget for the whole image; 1 - alpha is the share of patches whose tiles are counted.
        tiles: the tile, 0 to n - 2, of each patch; see `tile_of_patch`.
        strict: as in the official code, the remainder of rounding is lost.

    Returns:
        (n, T) bool, the patches that remain.

    Raises:
        ValueError: with `strict` and alpha=1, where the official code divides by zero.
    """
    n, t = last.shape
    own = min(int(budget * alpha), t)
    others = min(budget - own, (n - 1) * t)
    counts = [own]
    rank = descending_rank(last, torch.ones_like(last, dtype=torch.bool))  # (n, T)
    if n == 1:
        return rank < min(budget, t)
    best = descending_rank(first[None], torch.ones_like(first, dtype=torch.bool)[None]) < int(t * (1 - alpha))  # (1, T)
    numbers = torch.arange(n - 1, device=first.device)
    found = ((to_device(tiles, first) == numbers[:, None]) & best).sum(1)[None]  # (1, n - 1) patches of each tile
    if not strict:
        room, total = torch.full_like(found, t), column([others], found)
        share = proportional(found.double(), total, room, "fraction")
    elif alpha == 1 and others:
        raise ValueError("strict=True: the official code divides by zero at alpha=1; give a smaller alpha")
    else:
        share = (found.float() / found.sum().float() * others).long().clamp(max=t)
    return rank < torch.cat([column(counts, found), share], 1).transpose(0, 1)


PRESETS: dict[str, dict[str, Any]] = {f"paper-{p}": {"rate": p / 100} for p in (40, 20, 10)}


@register("hired", presets=PRESETS)
@dataclass(frozen=True)
class HiRED(Method):
    """Keep the patches with the largest class-token attention; tiles share an image's budget by attention in block 0.

    Images that are encoded whole: keep the patches with the largest attention of the class token in the block whose
    output is the feature map, which is FasterVLM's selection. Images in crops: half of the budget goes to the whole
    image, the other half to its tiles. A tile's share is proportional to the number of patches with the largest
    attention in block 0 that it contains. Source: hasanar1f/HiRED @ 502d6dd. Deviations: patches are counted in the
    area of each tile, while the official code counts equal runs in raster order; the remainder of rounding goes to
    other tiles; newline tokens stay where the package puts them. `strict` undoes these three.

    Presets: "paper-20" is the paper's 20 % of the patches of all crops, and so on.

    Args:
        tokens: visual tokens of an image; an image in n crops has n times tokens // (largest number of crops of the
            model). Default 64 if `rate` is not given.
        rate: share of the patches kept, rounded down, instead of `tokens`.
        alpha: share of the budget for the whole image, and share of the patches in block 0 that are not counted.
        strict: follow the official code in the three deviations.
    """

    tokens: int | None = None
    rate: float | None = None
    alpha: float = 0.5
    strict: bool = False

    info = MethodInfo(
        paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution VLMs, AAAI 2025",
        where="before the language model, by the vision tower's class-token attention",
        source="hasanar1f/HiRED @ 502d6dd",
        licence="MIT",
        batch="any (official code: 1 without crops)",
    )
    positions = "renumber"
    decode = "cache"
    requires = frozenset({"class token"})
    fixes_budget = ("rate",)

    def __post_init__(self) -> None:
        at_most_one(tokens=self.tokens, rate=self.rate)
        integer("tokens", self.tokens, 1)
        real("rate", self.rate, 0, 1)
        real("alpha", self.alpha, 0, 1, none=False)
        choice("strict", self.strict, (True, False))
        if self.tokens is None and self.rate is None:
            object.__setattr__(self, "tokens", 64)

    def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
        return {0: [0], feature_layer: [0]}

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        first, last = (view.attention[b][:, :, 0, 1:].sum(1) for b in (0, view.feature_layer))  # (N, T) each
        t = last.shape[1]
        if self.budget(1, t, view.crops) >= t:
            return None
        if view.crops == 1:
            return view.keep_top(last, self.budget(1, t, 1))
        live, start = [], 0
        for image in view.layout:
            if image.rows * image.columns != image.crops - 1:
                raise ValueError(f"hired: the grid of an image's {image.crops} crops is not known; pass image_sizes")
            tiles = tile_of_patch(image, view.grid, self.strict) if image.crops > 1 else []
            rows = slice(start, start + image.crops)
            budget = self.budget(image.crops, t, view.crops)
            live.append(select(first[start], last[rows], budget, self.alpha, tiles, self.strict))
            start += image.crops
        kept = torch.cat(live)  # (N, T)
        patches = torch.arange(t, device=kept.device).expand_as(kept)
        return VisionCut(kept, view.features, patches if self.strict else None)

    def budget(self, n: int, t: int, crops: int) -> int:
        """Return the number of tokens of an image of n crops with t patches each; the model has at most `crops`."""
        if self.rate is not None:
            return int(n * t * self.rate + (0 if self.strict else 1e-9))
        assert self.tokens is not None
        return n * per_crop(self.tokens, crops)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.budget(1, n_visual, 1), n_visual)] * n_layers
