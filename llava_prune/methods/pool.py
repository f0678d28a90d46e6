"""Two downsampling baselines: average pooling of the feature grid, and a smaller image."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .base import Method, MethodInfo
from .checks import integer
from .registry import register
from .views import MERGED, VisionCut, VisionView


def rectangle(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of the grid with the largest number of cells within a budget.

    One side is at most twice the other, if the grid of patches allows it. Among grids with equal numbers of cells, the
    one nearest to a square is chosen, with more columns than rows.

    Args:
        tokens: largest number of cells, at least 1.
        grid: (rows, columns) of patches, the upper limits of rows and columns.
    """
    pairs = [(h, min(tokens // h, grid[1])) for h in range(1, min(tokens, grid[0]) + 1)]
    fair = [(h, w) for h, w in pairs if max(h, w) <= 2 * min(h, w)] or pairs
    return max(fair, key=lambda p: (p[0] * p[1], -abs(p[0] - p[1]), p[1]))


def _cells(grid: tuple[int, int], size: tuple[int, int], live: Tensor) -> Tensor:
    """Return (N, T) long: the cell of a (rows, columns) grid of `size` that contains the centre of each patch."""
    rows, columns = (((torch.arange(n) + 0.5) * k / n).long() for n, k in zip(grid, size, strict=True))
    return (rows[:, None] * size[1] + columns).flatten().to(live.device).expand(live.shape[0], -1)


@dataclass(frozen=True)
class Coarser(Method):
    """Base class of methods that replace the patches by a coarser grid of features, which a subclass computes.

    Args:
        tokens: largest number of visual tokens of an image; each crop of it gets tokens // (largest number of crops of
            the model).
    """

    tokens: int = 64

    positions = "renumber"
    decode = "cache"
    makes_tokens = True

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)

    def grid_features(self, view: VisionView, rows: int, columns: int) -> Tensor:
        """Return (N, rows x columns, Dv) features in raster order."""
        raise TypeError(f"{self!r} must define grid_features()")

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        keep = view.tokens_per_crop(self.tokens)
        if keep >= view.features.shape[1]:
            return None
        size = rectangle(keep, view.grid)
        features = self.grid_features(view, *size).to(view.features)  # (N, K, Dv)
        live = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        ids = torch.full_like(live, MERGED, dtype=torch.long)
        groups = functools.partial(_cells, view.grid, size, live)
        return VisionCut(live, features, ids, counts=[features.shape[1]] * features.shape[0], groups=groups)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        if self.tokens >= n_visual:
            return [n_visual] * n_layers
        side = round(n_visual**0.5)
        rows, columns = rectangle(self.tokens, (side, side) if side * side == n_visual else (n_visual, n_visual))
        return [rows * columns] * n_layers


@register("pool")
@dataclass(frozen=True)
class Pool(Coarser):
    """Replace the patch features by averages over a coarser grid, before the projector.

    The grid is that of `rectangle`: 12 x 16 for 192 tokens, 8 x 16 for 128, 8 x 8 for 64. A cell averages the patches
    that it overlaps (adaptive average pooling). Images in crops: the same in each crop, crop after crop, without
    newline tokens. A budget of all tokens keeps the image unchanged.

    Args:
        tokens: largest number of visual tokens of an image; each crop of it gets tokens // (largest number of crops of
            the model).
    """

    info = MethodInfo(
        paper="baseline", where="before the language model, on the vision tower's features", source="ours", licence="-"
    )

    def grid_features(self, view: VisionView, rows: int, columns: int) -> Tensor:
        cells = view.features.float().transpose(1, 2).unflatten(2, view.grid)  # (N, Dv, height, width)
        return adaptive_avg_pool2d(cells, (rows, columns)).flatten(2).transpose(1, 2)


@register("resize")
@dataclass(frozen=True)
class Resize(Coarser):
    """Encode a smaller image: resize it to fewer patches and interpolate the tower's position embeddings.

    The grid is that of `pool`: 12 x 16 patches for 192 tokens, 8 x 16 for 128, 8 x 8 for 64. The input of the tower,
    including padding, is resized (bicubic, with antialiasing). The model package still encodes the full image, so the
    tower runs a second time on the small one; counts and FLOPs are those of the language model. Images in crops: the
    same in each crop, crop after crop, without newline tokens. A budget of all tokens keeps the image unchanged.

    Args:
        tokens: largest number of visual tokens of an image; each crop of it gets tokens // (largest number of crops of
            the model).
    """

    info = MethodInfo(
        paper="baseline", where="before the language model, on the image itself", source="ours", licence="-"
    )

    def grid_features(self, view: VisionView, rows: int, columns: int) -> Tensor:
        if view.encode is None:
            raise ValueError("resize needs the pixels that the tower was given as one tensor; give images of one size")
        return view.encode(rows, columns)
