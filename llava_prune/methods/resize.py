"""Resized images, a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import MethodInfo
from .pool import Coarser
from .registry import register
from .views import VisionView


@register("resize")
@dataclass(frozen=True)
class Resize(Coarser):
    """Encode a smaller image: resized to fewer patches, the tower's position embeddings interpolated.

    The grid is that of `pool`: 192 tokens are 12 x 16 patches, 128 are 8 x 16, 64 are 8 x 8. The image is resized as
    the tower gets it, padding included (bicubic, with antialiasing). The model package encodes the full image as ever,
    so the tower runs a second time, on the small one; counts and FLOPs are those of the language model. Images in
    crops: the same in each crop, crop after crop, without newline tokens. A budget of all tokens keeps the image
    unchanged.

    Args:
        tokens: most visual tokens of an image; each crop of it gets tokens // (largest number of crops of the model).
    """

    info = MethodInfo(
        paper="baseline", where="before the language model, on the image itself", source="ours", licence="-"
    )

    def grid_features(self, view: VisionView, rows: int, columns: int) -> Tensor:
        if view.encode is None:
            raise ValueError("resize needs the pixels that the tower was given as one tensor; give images of one size")
        return view.encode(rows, columns)
