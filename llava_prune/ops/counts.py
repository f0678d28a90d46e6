"""Token counts and FLOPs that two methods or more are computed from: plain Python, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Sizes of a model that token counts and FLOPs depend on; the defaults are LLaVA-1.5-7B's.

    Attributes:
        layers: L, decoder layers.
        hidden: d, hidden size.
        intermediate: m, MLP size.
        visual: visual tokens before pruning.
    """

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    visual: int = 576


@dataclass(frozen=True)
class TokenShare:
    """A budget in percent of the visual tokens of an image, in (0, 100]."""

    percent: float

    def __str__(self) -> str:
        return f"{self.percent:g}%"


@dataclass(frozen=True)
class FlopsShare:
    """A budget in percent of the FLOPs of the unpruned model, in (0, 100]; see `methods.budgets.tokens_for`."""

    percent: float

    def __str__(self) -> str:
        return f"{self.percent:g}% of the FLOPs"


def tokens_after_full_layers(tokens: int, n_visual: int, n_layers: int, full: int) -> int:
    """Visual tokens in the remaining layers for a mean of `tokens` entering, when `full` layers see all `n_visual`.

    May be below 1, which means that the budget cannot be met.
    """
    if full >= n_layers:
        return 0
    return round((tokens * n_layers - full * n_visual) / (n_layers - full))


def full_layers(tokens: int, n_visual: int, n_layers: int, choices: Sequence[int]) -> tuple[int, int]:
    """(full layers, tokens in the others) for a mean of `tokens` entering: the first choice that leaves a token.

    Args:
        tokens: budget, at most `n_visual`.
        n_visual: visual tokens in the full layers.
        n_layers: decoder layers.
        choices: numbers of full layers, the preferred one first.

    Raises:
        ValueError: for a budget that the full layers of every choice exceed.
    """
    for full in choices:
        rest = tokens_after_full_layers(tokens, n_visual, n_layers, full)
        if rest >= 1:
            return full, rest
    raise ValueError(
        f"tokens={tokens}: {full} full layer(s) of {n_layers} with {n_visual} visual tokens exceed that; "
        f"give at least {full * n_visual // n_layers + 1}" + (" or a smaller layer" if full > 1 else "")
    )


def layer_flops(n: float, hidden: int, intermediate: int) -> float:
    """4 n d^2 + 2 n^2 d + 3 n d m: one decoder layer on n tokens. Source: equation (2) of the supplement.

    Args:
        n: tokens of the layer.
        hidden: d, hidden size.
        intermediate: m, MLP size.

    Raises:
        ValueError: for a negative n.
    """
    if n < 0:
        raise ValueError(f"n={n}: a layer cannot process fewer than 0 tokens; give 0 or more")
    return 4 * n * hidden**2 + 2 * n**2 * hidden + 3 * n * hidden * intermediate


def flops_visual_only(counts: Sequence[float], size: Size) -> float:
    """Equation (2) with n_i the visual tokens of layer i."""
    return sum(layer_flops(n, size.hidden, size.intermediate) for n in counts)


def percent_visual_only(counts: Sequence[float], size: Size) -> float:
    """`flops_visual_only` in percent of the unpruned model's."""
    return 100 * flops_visual_only(counts, size) / flops_visual_only([size.visual] * len(counts), size)


def tokens_for_flops(flops: float, hidden: int, intermediate: int) -> int:
    """The whole number of tokens nearest to a layer's FLOPs, the inverse of `layer_flops`; 0 for none."""
    if flops <= 0:
        return 0
    linear, square = 4 * hidden**2 + 3 * hidden * intermediate, 2 * hidden
    return round((math.sqrt(linear**2 + 4 * square * flops) - linear) / (2 * square))
