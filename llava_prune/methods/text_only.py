"""The prompt without its image, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import EntryMethod, MethodInfo
from .registry import register
from .views import View


@register("text-only")
@dataclass(frozen=True)
class TextOnly(EntryMethod):
    """Drop every visual token before the first layer: what the language model answers from the question alone."""

    info = MethodInfo(paper="baseline", where="before the language model", source="ours", licence="-")

    def choose(self, view: View, tokens: Tensor, real: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return view.ids.new_zeros(tokens.shape[0], 0), None

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [0] * n_layers
