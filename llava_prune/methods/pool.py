"""Average pooling of the feature grid, a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_avg_pool2d

from .base import Method, MethodInfo
from .checks import integer
from .registry import register
from .views import MERGED, VisionCut, VisionView


def rectangle(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the grid of most cells that a budget allows.

    A square where the budget is one. Otherwise one side is at most twice the other (where the grid allows it), and of
    equal numbers the one nearest to a square counts, with more columns than rows.

    Args:
        tokens: most cells, at least 1.
        grid: (rows, columns) of the patches, the most of either.
    """
    pairs = [(h, min(tokens // h, grid[1])) for h in range(1, min(tokens, grid[0]) + 1)]
    fair = [(h, w) for h, w in pairs if max(h, w) <= 2 * min(h, w)] or pairs
    return max(fair, key=lambda p: (p[0] * p[1], -abs(p[0] - p[1]), p[1]))


def grid_counts(tokens: int, n_visual: int, n_layers: int) -> list[int]:
    """Visual tokens entering each layer: the cells of `rectangle`, or all tokens where the budget allows them."""
    if tokens >= n_visual:
        return [n_visual] * n_layers
    side = round(n_visual**0.5)
    rows, columns = rectangle(tokens, (side, side) if side * side == n_visual else (n_visual, n_visual))
    return [rows * columns] * n_layers


@register("pool")
@dataclass(frozen=True)
class Pool(Method):
    """Replace the patch features by averages over a coarser grid, before the projector.

    The grid is that of `rectangle`: 192 tokens are 12 x 16, 128 are 8 x 16, 64 are 8 x 8. A cell averages the patches
    that it touches (adaptive average pooling). Images in crops: the same in each crop, crop after crop, without newline
    tokens. A budget of all tokens keeps the image unchanged.

    Args:
        tokens: most visual tokens of an image; each crop of it gets tokens // (largest number of crops of the model).
    """

    tokens: int = 64

    info = MethodInfo(
        paper="baseline", where="before the language model, on the vision tower's features", source="ours", licence="-"
    )
    positions = "renumber"
    decode = "cache"
    makes_tokens = True

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        n, t, width = view.features.shape
        keep = view.tokens_per_crop(self.tokens)
        if keep >= t:
            return None
        rows, columns = rectangle(keep, view.grid)
        cells = view.features.float().transpose(1, 2).unflatten(2, view.grid)  # (N, Dv, height, width)
        pooled = adaptive_avg_pool2d(cells, (rows, columns)).flatten(2).transpose(1, 2)  # (N, K, Dv)
        live = torch.ones(n, rows * columns, dtype=torch.bool, device=pooled.device)
        ids = torch.full_like(live, MERGED, dtype=torch.long)
        return VisionCut(live, pooled.to(view.features.dtype), ids, counts=[rows * columns] * n)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return grid_counts(self.tokens, n_visual, n_layers)
