"""Resized images, a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Method, MethodInfo
from .checks import integer
from .pool import grid_counts, rectangle
from .registry import register
from .views import MERGED, VisionCut, VisionView


@register("resize")
@dataclass(frozen=True)
class Resize(Method):
    """Encode a smaller image: resized to fewer patches, the tower's position embeddings interpolated.

    The grid is that of `pool`: 192 tokens are 12 x 16 patches, 128 are 8 x 16, 64 are 8 x 8. The image is resized as
    the tower gets it, padding included (bicubic, with antialiasing). The model package encodes the full image as ever,
    so the tower runs a second time, on the small one; counts and FLOPs are those of the language model. Images in
    crops: the same in each crop, crop after crop, without newline tokens. A budget of all tokens keeps the image
    unchanged.

    Args:
        tokens: most visual tokens of an image; each crop of it gets tokens // (largest number of crops of the model).
    """

    tokens: int = 64

    info = MethodInfo(
        paper="baseline", where="before the language model, on the image itself", source="ours", licence="-"
    )
    positions = "renumber"
    decode = "cache"
    makes_tokens = True

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, 1, none=False)

    def prune_vision(self, view: VisionView) -> VisionCut | None:
        keep = view.tokens_per_crop(self.tokens)
        if keep >= view.features.shape[1]:
            return None
        if view.encode is None:
            raise ValueError("resize needs the pixels that the tower was given as one tensor; give images of one size")
        rows, columns = rectangle(keep, view.grid)
        features = view.encode(rows, columns).to(view.features)  # (N, K, Dv)
        live = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        ids = torch.full_like(live, MERGED, dtype=torch.long)
        return VisionCut(live, features, ids, counts=[rows * columns] * features.shape[0])

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return grid_counts(self.tokens, n_visual, n_layers)
