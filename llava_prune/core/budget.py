"""The retention curve and its budget: plain Python on integers and floats, no model."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

Budget = Literal["after", "before"]
PEAK = 0.75
"""Upper end of the logistic curve in the official code."""
RECYCLED = 0.3
"""Share of the pruned tokens that is clustered; one cluster for ten of them."""


@dataclass(frozen=True)
class Schedule:
    """What AutoPrune keeps in each layer.

    Attributes:
        keep: tokens kept by rank in layers 0..L-1 (layer 0: the cross-modal cut).
        recycle: tokens clustered in each layer.
        merged: clusters appended in each layer.
        leaving: visual tokens leaving each layer, keep + merged.
        scale: the factor on the curve.
        steps: cost evaluations the search took.
    """

    keep: tuple[int, ...]
    recycle: tuple[int, ...]
    merged: tuple[int, ...]
    leaving: tuple[int, ...]
    scale: float
    steps: int

    def entering(self, n_visual: int) -> list[int]:
        """Visual tokens entering each layer, the first seeing all `n_visual`."""
        return [n_visual, *self.leaving[:-1]]

    def without_moves(self) -> Schedule:
        """The same counts, but a layer that drops one token and recycles it alone (moves it to the end) keeps it."""
        moves = [pair == (1, 1) for pair in zip(self.recycle, self.merged, strict=True)]
        keep = tuple(k + m for k, m in zip(self.keep, moves, strict=True))
        recycle = tuple(n * (not m) for n, m in zip(self.recycle, moves, strict=True))
        merged = tuple(n * (not m) for n, m in zip(self.merged, moves, strict=True))
        return replace(self, keep=keep, recycle=recycle, merged=merged)


@functools.lru_cache(maxsize=8192)
def recycled(pruned: int) -> tuple[int, int]:
    """(tokens clustered, clusters) for `pruned` dropped tokens; (0, 0) for none."""
    if pruned <= 0:
        return 0, 0
    q = int(RECYCLED * pruned) + 1
    return q, min(q // 10 + 1, q)


def logistic(slope: float, x0: float, n_layers: int) -> list[float]:
    """Retention of layers 1..L-1: 0.75 / (1 + exp(k (l - (x0 + k)))), k the slope; its midpoint is x0 + k."""
    out = []
    for layer in range(1, n_layers):
        power = slope * (layer - (x0 + slope))
        out.append(PEAK / (1.0 + math.exp(min(power, 700.0))))
    return out


def _cost(curve: list[float], factor: float, first: int, cap: int, n_visual: int, budget: Budget) -> int:
    n, total = first, first
    last, ceil = 0, math.ceil
    for r in curve:
        share = factor * r
        m = ceil((first - 1) * share) if share < 1.0 else first - 1
        m = m if m < cap else cap
        last = n = m + recycled(n - m)[1]
        total += n
    return total if budget == "after" else total - last + n_visual


def _search(
    curve: list[float], first: int, cap: int, tokens: float, n_visual: int, budget: Budget
) -> tuple[float, int]:
    n_layers = len(curve) + 1
    goal = n_layers * tokens
    unscaled = [int(v) for v in (torch.tensor(curve, dtype=torch.float32) * first).tolist()]
    if budget == "after" and unscaled and abs(sum(unscaled) + unscaled[-1] - goal) < 1:
        return 1.0, 0
    low, high, best, gap = 0.0, 20.0, 1.0, math.inf
    for step in range(1, 201):
        middle = (low + high) / 2
        cost = _cost(curve, middle, first, cap, n_visual, budget)
        if abs(cost - goal) < gap:
            best, gap = middle, abs(cost - goal)
        if gap < 0.01:
            return best, step
        if (cost < goal and middle == low) or (cost >= goal and middle == high):
            return best, step  # the interval is one float wide: no later step could change the answer
        low, high = (middle, high) if cost < goal else (low, middle)
    return best, 200


@functools.lru_cache(maxsize=4096)
def schedule(
    slope: float,
    tokens: int,
    n_visual: int,
    n_layers: int,
    x0: float,
    budget: Budget = "after",
    first: int | None = None,
) -> Schedule:
    """Counts of every layer for one picture.

    Source: official code, sections 6 to 9 of the method's specification. The bisection stops once its interval
    is a single float, with the answer of the official 200 steps.

    Args:
        slope: k >= 0 of the logistic curve.
        tokens: budget B, the mean over layers of visual tokens leaving ("after") or entering ("before") a layer.
        n_visual: N, visual tokens of the picture.
        n_layers: L >= 2.
        x0: midpoint of the curve, before the slope shifts it.
        budget: which mean `tokens` is.
        first: tokens kept by layer 0; default min(2.5 B, N).

    Raises:
        ValueError: for fewer than 2 layers, a budget below 1, or one that no curve can meet.
    """
    if n_layers < 2:
        raise ValueError(f"a schedule needs at least 2 layers, got {n_layers}")
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: the budget must be at least 1")
    cap = min(int(2.5 * tokens), n_visual)
    first = cap if first is None else first
    if tokens >= n_visual:  # nothing to prune: leave the sequence alone
        whole, none = (n_visual,) * n_layers, (0,) * n_layers
        return Schedule(whole, none, none, whole, 1.0, 0)
    curve = logistic(slope, x0, n_layers)
    least = _cost(curve, 0.0, first, cap, n_visual, budget)
    if least > n_layers * tokens:
        what = "entering" if budget == "before" else "leaving"
        raise ValueError(
            f"tokens={tokens}: the first layers alone bring the average of tokens {what} each of {n_layers} layers to "
            f"{least / n_layers:.1f} for {n_visual} visual tokens; give a larger budget"
            + (" or budget='after'" if budget == "before" else "")
        )
    factor, steps = _search(curve, first, cap, tokens, n_visual, budget)
    scaled = torch.tensor([factor * r for r in curve], dtype=torch.float32)
    wanted = [int(v) for v in torch.ceil(scaled * torch.tensor(float(first - 1), dtype=torch.float32)).tolist()]
    keep, recycle, merged, leaving = [first], [0], [0], [first]
    for want in wanted:
        m = min(want, leaving[-1])
        q, c = recycled(leaving[-1] - m)
        keep.append(m)
        recycle.append(q)
        merged.append(c)
        leaving.append(m + c)
    return Schedule(tuple(keep), tuple(recycle), tuple(merged), tuple(leaving), factor, steps)


def per_crop(tokens: int, crops: int) -> int:
    """What each crop of a picture gets of a budget: tokens // (most crops of the model), at least 1."""
    return max(tokens // crops, 1)
