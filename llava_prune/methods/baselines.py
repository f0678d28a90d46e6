"""Baselines that ignore the content of the image: random tokens, evenly spaced tokens, and no visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import MethodInfo, ScoreMethod
from .checks import integer, seed
from .registry import register
from .views import View


class _Blind(ScoreMethod):
    """Base class of methods that keep some visual tokens before the first layer, independent of their content.

    The rest of the prompt moves up (positions 0..n-1), as if the image had only that many patches.
    """

    info = MethodInfo(paper="baseline", where="before the language model", source="ours", licence="-")
    positions = "renumber"
    decode = "cache"
    tokens: int

    def ranking(self, n: int) -> Tensor:
        """Return (n,) float scores for an image of n tokens; the tokens with the largest scores are kept."""
        raise TypeError("a subclass says which tokens it keeps")

    def scores(self, layer: int, view: View) -> Tensor:
        table = torch.zeros(len(view.spans.n_visual), max(view.spans.n_visual))  # (B, V)
        for b, n in enumerate(view.spans.n_visual):
            table[b, :n] = self.ranking(n)
        place = (view.visual.cumsum(1) - 1).clamp(min=0)  # (B, L) index among the visual tokens of the sample
        return table.to(view.hidden.device, non_blocking=True).gather(1, place)

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [min(self.tokens, n_visual)] * n_layers


@register("random")
@dataclass(frozen=True)
class Random(_Blind):
    """Keep random visual tokens, at the same places in every image with the same number of tokens.

    The places depend on `seed` and the number of tokens only, so answers do not depend on how images are batched.

    Args:
        tokens: visual tokens kept in every layer.
        seed: seed of the random choice.
    """

    tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, none=False)
        seed(self.seed)

    def ranking(self, n: int) -> Tensor:
        return torch.rand(n, generator=torch.Generator().manual_seed(self.seed))


@register("uniform")
@dataclass(frozen=True)
class Uniform(_Blind):
    """Keep evenly spaced visual tokens in sequence order.

    These are the tokens floor((i + 0.5) n / tokens) for i = 0..tokens-1, n being the number of visual tokens.

    Args:
        tokens: visual tokens kept in every layer.
    """

    tokens: int = 64

    def __post_init__(self) -> None:
        integer("tokens", self.tokens, none=False)

    def ranking(self, n: int) -> Tensor:
        out = torch.zeros(n)
        k = min(self.tokens, n)
        out[[(2 * i + 1) * n // (2 * k) for i in range(k)]] = 1.0
        return out


@register("text-only")
@dataclass(frozen=True)
class TextOnly(_Blind):
    """Drop every visual token before the first layer, so that the language model sees the question alone."""

    def scores(self, layer: int, view: View) -> Tensor:
        return view.visual.float()

    def plan(self, n_visual: int, n_layers: int) -> list[int]:
        return [0] * n_layers
