"""Baselines that look at nothing: a random and a regular choice of visual tokens before the first layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import whole
from ..core.method import Method
from ..core.registry import register
from ..core.select import keep_best
from ..core.types import Cut, View


class _Blind(Method):
    """Keep `tokens` of the visual tokens before the first layer, whatever they show.

    The rest of the prompt moves up (positions 0..n-1), as if the picture had that many patches.
    """

    positions = "renumber"
    decode = "cache"
    where = "before the language model"
    source = "ours"
    licence = "-"
    tokens: int

    def _check(self) -> None:
        whole("tokens", self.tokens, none=False)

    def score(self, n: int) -> Tensor:
        """(n,) float: larger is kept, for a picture of n tokens."""
        raise TypeError("a subclass says which tokens it keeps")

    def cut(self, layer: int, view: View) -> Cut | None:
        if layer != -1 or all(n <= self.tokens for n in view.spans.n_visual):
            return None
        width = max(view.spans.n_visual)
        table = torch.zeros(len(view.spans.n_visual), width)  # (B, V)
        for b, n in enumerate(view.spans.n_visual):
            table[b, :n] = self.score(n)
        place = (view.visual.cumsum(1) - 1).clamp(min=0)  # (B, L) which visual token of its sample
        score = table.to(view.hidden.device).gather(1, place)
        keep = [min(n, self.tokens) for n in view.spans.n_visual]
        return keep_best(view, score, keep)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers


@register("random")
@dataclass(frozen=True)
class Random(_Blind):
    """Random visual tokens, the same places for every picture of that size.

    The places depend on `seed` and the number of tokens only, so answers do not depend on how pictures are batched.

    Args:
        tokens: visual tokens kept in every layer.
        seed: of the draw.
    """

    tokens: int = 64
    seed: int = 0
    paper = "baseline"

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: give a whole number")

    def score(self, n: int) -> Tensor:
        return torch.rand(n, generator=torch.Generator().manual_seed(self.seed))


@register("uniform")
@dataclass(frozen=True)
class Uniform(_Blind):
    """Evenly spaced visual tokens in sequence order.

    Token floor((i + 0.5) n / tokens) for i = 0..tokens-1.

    Args:
        tokens: visual tokens kept in every layer.
    """

    tokens: int = 64
    paper = "baseline"

    def __post_init__(self) -> None:
        self._check()

    def score(self, n: int) -> Tensor:
        out = torch.zeros(n)
        k = min(self.tokens, n)
        out[[(2 * i + 1) * n // (2 * k) for i in range(k)]] = 1.0
        return out
