"""Token counts and FLOPs that two or more methods use. Plain Python, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The sizes of a model on which token counts and FLOPs depend; the defaults are those of LLaVA-1.5-7B.

    Attributes:
        layers: L, number of decoder layers.
        hidden: d, hidden size.
        intermediate: m, MLP size.
        visual: number of visual tokens before pruning.
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
    """Return the visual tokens after `full` unpruned layers for a mean of `tokens` entering all layers.

    A result below 1 means that the budget cannot be met.
    """
    if full >= n_layers:
        return 0
    return round((tokens * n_layers - full * n_visual) / (n_layers - full))


def full_layers(tokens: int, n_visual: int, n_layers: int, choices: Sequence[int]) -> tuple[int, int]:
    """Return (full layers, tokens in the others) for a mean of `tokens` entering all layers.

    The first of `choices` is taken that leaves at least one token for the other layers.

    Args:
        tokens: budget, at most `n_visual`.
        n_visual: number of visual tokens in the full layers.
        n_layers: number of decoder layers.
        choices: numbers of full layers, the preferred one first.

    Raises:
        ValueError: if the full layers exceed the budget for every choice.
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
    """Return the FLOPs of one decoder layer on n tokens, 4 n d^2 + 2 n^2 d + 3 n d m.

    Source: equation (2) of the supplement.

    Args:
        n: number of tokens in the layer.
        hidden: d, hidden size.
        intermediate: m, MLP size.

    Raises:
        ValueError: for a negative n.
    """
    if n < 0:
        raise ValueError(f"n={n}: a layer cannot process fewer than 0 tokens; give 0 or more")
    return 4 * n * hidden**2 + 2 * n**2 * hidden + 3 * n * hidden * intermediate


def flops_visual_only(counts: Sequence[float], size: Size) -> float:
    """Return the FLOPs of all layers by equation (2), with n_i the visual tokens of layer i."""
    return sum(layer_flops(n, size.hidden, size.intermediate) for n in counts)


def percent_visual_only(counts: Sequence[float], size: Size) -> float:
    """Return `flops_visual_only` in percent of that of the unpruned model."""
    return 100 * flops_visual_only(counts, size) / flops_visual_only([size.visual] * len(counts), size)


def tokens_for_flops(flops: float, hidden: int, intermediate: int) -> int:
    """Return the rounded number of tokens for a layer's FLOPs, the inverse of `layer_flops`; 0 if flops <= 0."""
    if flops <= 0:
        return 0
    linear, square = 4 * hidden**2 + 3 * hidden * intermediate, 2 * hidden
    return round((math.sqrt(linear**2 + 4 * square * flops) - linear) / (2 * square))
