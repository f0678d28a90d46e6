"""The unpruned model, run through the same runtime as the pruning methods."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method, MethodInfo
from .registry import register


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """No pruning: every visual token goes through every layer."""

    info = MethodInfo(paper="the unpruned model", where="nowhere", source="ours", licence="-")
    replays = True

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [n_visual] * n_layers
