"""Budgets that depend on the model: a share of its visual tokens or of its FLOPs."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

from ..ops.counts import FlopsShare, Size, TokenShare, percent_visual_only
from .registry import build

Budget = int | TokenShare | FlopsShare


def tokens_for(budget: Budget, name: str, hyper: Mapping[str, Any], size: Size | None) -> int:
    """Convert a budget to a number of visual tokens for a method.

    A share of the FLOPs becomes the number of tokens whose share is nearest, the larger number if two are equally near.
    FLOPs follow equation (2) of the paper with n_i the visual tokens that enter layer i, as its text defines n_i. If
    the counts depend on the question, those of `Method.example` are used.

    Args:
        budget: the budget.
        name: name of the method, with its preset.
        hyper: hyper-parameters besides the budget.
        size: sizes of the model; not needed for an integer budget.

    Raises:
        ValueError: for a method whose counts are not known in advance, or a share below the smallest possible one.
    """
    if isinstance(budget, int):
        return budget
    if size is None:
        raise ValueError(f"a budget of {budget} depends on the model, whose size is not known here; give a number")
    if isinstance(budget, TokenShare):
        return max(1, round(budget.percent / 100 * size.visual))
    return _nearest(lambda n: flops_percent(name, {**hyper, "tokens": n}, size), budget, name, size.visual)


def flops_percent(name: str, hyper: Mapping[str, Any], size: Size) -> float:
    """Return the FLOPs of a method in percent of those of the unpruned model; see `tokens_for`.

    Raises:
        ValueError: for hyper-parameters out of range, or counts that depend on the image.
    """
    found = build(name, **hyper).example(size.visual, size.layers)
    if found is None:
        raise ValueError(f"{name} keeps a number of tokens that depends on the image, so its FLOPs are not known ahead")
    return percent_visual_only(found[0], size)


def _nearest(percent: Callable[[int], float], budget: FlopsShare, name: str, most: int) -> int:
    """Return the number of tokens whose share is nearest to a budget; `percent` must grow with the number."""
    percent(most)  # raises if the counts are not known in advance

    def share(n: int) -> float:
        try:
            return percent(n)
        except ValueError:
            return -1.0  # too few tokens for this method

    counts = range(1, most + 1)
    least = counts[bisect.bisect_left(counts, 0.0, key=share)]
    above = counts[min(bisect.bisect_left(counts, budget.percent, key=share), most - 1)]
    below = max(above - 1, least)
    nearest = below if budget.percent - share(below) < share(above) - budget.percent else above
    if nearest == least and share(least) > budget.percent + 1:
        raise ValueError(
            f"{name} cannot go down to {budget}: the fewest tokens it takes, {least}, are {share(least):.1f}%"
        )
    return nearest
