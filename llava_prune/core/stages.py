"""Counts of methods that prune after a few layers only: plain Python on integers, no model.

An average of tokens *entering* the layers is what they work on; SparseVLM's counter averages those *leaving*.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from .budget import recycled

Step = tuple[int, int, int]
"""(kept, recycled, clusters) after one layer."""


def after_full(tokens: int, n_visual: int, n_layers: int, full: int) -> int:
    """Tokens in the other layers, for a mean of `tokens` entering when `full` layers see everything; may be below 1."""
    if full >= n_layers:
        return 0
    return round((tokens * n_layers - full * n_visual) / (n_layers - full))


WIDTH, INNER = 4096, 11008
"""d and m of LLaVA-1.5-7B, for shares of FLOPs (13B has nearly the same m / d)."""


def after_full_by_flops(share: float, n_visual: int, n_layers: int, full: int) -> int:
    """Tokens in the other layers that bring the FLOPs on visual tokens alone nearest to a share of the unpruned ones.

    FLOPs of a layer on n tokens: 4 n d^2 + 2 n^2 d + 3 n d m. May be 0.
    """
    linear, square = 4 * WIDTH**2 + 3 * WIDTH * INNER, 2 * WIDTH
    each = n_visual * linear + n_visual**2 * square
    left = (share * n_layers - full) * each / (n_layers - full)  # FLOPs of one pruned layer
    return 0 if left <= 0 else round((math.sqrt(linear**2 + 4 * square * left) - linear) / (2 * square))


def with_recovery(keep: int, n_visual: int, every: int) -> tuple[int, int]:
    """(kept by rank, recovered) when every `every`-th of the others comes back; 0 for none."""
    keep = min(keep, n_visual)
    return keep, math.ceil((n_visual - keep) / every) if every else 0


def within_total(total: int, n_visual: int, every: int) -> tuple[int, int]:
    """The most kept by rank, and what is recovered then, that together are `total` tokens at most; (0, 0) if none."""
    keep = (every * total - n_visual) // (every - 1) if every > 1 else 0 if every else total
    return with_recovery(keep, n_visual, every) if keep > 0 else (0, 0)


PYRAMID = (2, 8, 16)
"""Stages of 32 layers that PyramidDrop's author recommends for small budgets (issue #29 of the repository)."""


@functools.lru_cache(maxsize=512)
def pyramid_recipe(tokens: int, n_visual: int, n_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Stages and ratios for a budget: the author's l, l^2, l^3 with the stages [2, 8, 16] of 32 layers.

    Other depths scale the stages. l has as few decimals, from two on, as bring the mean of tokens entering within 2 %
    of the budget; on 32 layers and 576 tokens that is .56, .42 and .19 for 192, 128 and 64. Where the layers before the
    first drop alone exceed the budget, the first drop moves to layer 1.

    Raises:
        ValueError: when no l meets the budget.
    """
    first, *later = (round(s * n_layers / 32) for s in PYRAMID)
    for start in dict.fromkeys((max(1, first), 1)):
        if start * n_visual >= tokens * n_layers:
            continue
        stages = [start]
        for s in later:
            stages.append(max(stages[-1] + 1, s))
        if stages[-1] >= n_layers:
            break
        for decimals in (2, 3, 4, 5, 6):
            unit = 10**decimals
            low, high = 0, unit  # the mean grows with l: the last l that is not above the budget, and its neighbour
            while high - low > 1:
                middle = (low + high) // 2
                over = _mean(middle / unit, stages, n_visual, n_layers) > tokens
                low, high = (low, middle) if over else (middle, high)
            best = min((low, high), key=lambda x: abs(_mean(x / unit, stages, n_visual, n_layers) - tokens))
            if abs(_mean(best / unit, stages, n_visual, n_layers) - tokens) <= 0.02 * tokens:
                break
        share = best / unit
        return tuple(stages), (share, share**2, share**3)
    raise ValueError(
        f"tokens={tokens}: no schedule of three drops on {n_layers} layers brings {n_visual} visual tokens to that "
        "average; give layers and ratios, or a larger budget"
    )


def _mean(share: float, stages: Sequence[int], n_visual: int, n_layers: int) -> float:
    counts = pyramid(stages, (share, share**2, share**3), n_visual, n_layers)
    return sum(counts) / n_layers


def pyramid(stages: Sequence[int], ratios: Sequence[float], n_visual: int, n_layers: int) -> list[int]:
    """Visual tokens entering each layer: int(share of the original count) from each stage on."""
    ends = [0, *stages, n_layers]
    kept = [n_visual, *(int(n_visual * r) for r in ratios)]
    return [k for k, a, b in zip(kept, ends[:-1], ends[1:], strict=True) for _ in range(b - a)]


def chain(n_visual: int, retain: Sequence[int], merging: bool) -> list[Step]:
    """What every sparse layer keeps, recycles and merges; at least one token goes at each.

    Returns:
        One (kept, recycled, clusters) a sparse layer; kept + clusters leave it.
    """
    steps, now = [], n_visual
    for want in retain:
        keep = max(0, min(want, now - 1))
        pool, clusters = recycled(now - keep) if merging else (0, 0)
        steps.append((keep, pool, clusters))
        now = keep + clusters
    return steps


@functools.lru_cache(maxsize=512)
def sparse_schedule(
    tokens: int, n_visual: int, n_layers: int, layers: tuple[int, ...], shape: tuple[int, ...], merging: bool
) -> dict[int, Step]:
    """Sparse layers and their counts for an average of `tokens` leaving the layers, on any depth and picture.

    `layers` (0-based, of 32) move with the depth: "after 3, 7 and 16 of 32 layers" becomes the same share of them. The
    counts of `shape` are multiplied by the factor that brings the average nearest to the budget. Where the layers
    before the first sparse one alone exceed it, that one moves forward.

    Raises:
        ValueError: when no factor comes within 5 % of the budget.
    """
    wanted = [max(1, round((x + 1) * n_layers / 32)) - 1 for x in layers]
    for first in range(wanted[0], -1, -1):
        places = [first]
        for x in wanted[1:]:
            places.append(max(places[-1] + 1, x))
        if places[-1] >= n_layers:
            break
        gap, steps = _fit(tokens, n_visual, n_layers, places, shape, merging)
        if gap <= max(0.5, 0.05 * tokens):
            return dict(zip(places, steps, strict=True))
    raise ValueError(
        f"tokens={tokens}: {len(layers)} sparse layers on {n_layers} layers cannot bring {n_visual} visual tokens to "
        "that average; give layers and retain, or another budget"
    )


def _fit(
    tokens: int, n_visual: int, n_layers: int, layers: Sequence[int], shape: Sequence[int], merging: bool
) -> tuple[float, list[Step]]:
    """The factor on `shape` by bisection: distance of the average to the budget, and the counts."""
    low, high = 0.0, n_visual / min(shape)
    best: tuple[float, list[Step]] = (math.inf, [])
    for _ in range(40):
        factor = (low + high) / 2
        steps = chain(n_visual, [max(1, round(factor * k)) for k in shape], merging)
        leaving = entering(dict(zip(layers, steps, strict=True)), n_visual, n_layers + 1)[1:]
        average = sum(leaving) / n_layers
        if abs(average - tokens) < best[0]:
            best = abs(average - tokens), steps
        low, high = (factor, high) if average < tokens else (low, factor)
    return best


def entering(steps: Mapping[int, Step], n_visual: int, n_layers: int) -> list[int]:
    """Visual tokens entering each layer, for steps after layers 0..n_layers - 2."""
    counts = [n_visual]
    for layer in range(n_layers - 1):
        keep, _, clusters = steps.get(layer, (counts[-1], 0, 0))
        counts.append(keep + clusters)
    return counts
