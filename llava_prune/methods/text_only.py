"""The prompt without its image, a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import MethodInfo, ScoreMethod
from .registry import register
from .views import View


@register("text-only")
@dataclass(frozen=True)
class TextOnly(ScoreMethod):
    """Drop every visual token before the first layer: what the language model answers from the question alone.

    The rest of the prompt moves up (positions 0..n-1), as if there were no image in it.
    """

    info = MethodInfo(paper="baseline", where="before the language model", source="ours", licence="-")
    positions = "renumber"
    decode = "cache"

    def scores(self, layer: int, view: View) -> Tensor:
        return view.visual.float()

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [0] * n_layers
