"""Confidence intervals of accuracies and mean scores, and a test of paired answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(right: float, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, or of a mean of scores in 0..1.

    The interval assumes the variance of successes and failures, which is the largest variance that scores with this
    mean can have. For scores between 0 and 1 the interval is therefore never too narrow.

    Args:
        right: number of successes, or sum of the scores, 0..total.
        total: number of trials; 0 gives (0, 1).

    Returns:
        (low, high) within 0..1.

    Raises:
        ValueError: if right is outside 0..total.
    """
    if not 0 <= right <= total:
        raise ValueError(f"right={right} is outside 0..{total}")
    if total == 0:
        return 0.0, 1.0
    p, z2 = right / total, Z95 * Z95
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == total else min(1.0, middle + half)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a mean of scores in 0..1; see `wilson`.

    Args:
        values: one score for each question; an empty sequence gives (0, 1).

    Returns:
        (low, high) within 0..1.
    """
    return wilson(min(sum(values), len(values)), len(values))


def share(right: Sequence[bool]) -> dict[str, Any]:
    """Return the percentage of right answers with its interval; accuracy is None if there are no answers."""
    low, high = wilson(sum(right), len(right))
    value = 100 * sum(right) / len(right) if right else None
    return {"accuracy": value, "low": 100 * low, "high": 100 * high, "right": sum(right), "rows": len(right)}


def average(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of scores in 0..1 in percent, with its interval; accuracy is None if there are no scores."""
    low, high = mean_interval(values)
    value = 100 * sum(values) / len(values) if values else None
    return {"accuracy": value, "low": 100 * low, "high": 100 * high, "rows": len(values)}


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference of two runs on the same questions, with its paired 95 % interval.

    The difference is the mean gain minus the mean loss, where gain and loss are the means of max(gap, 0) and
    max(-gap, 0) over the questions. Wilson intervals of both are combined by MOVER. The interval has a positive width
    even if no answer differs, and it does not assume a normal distribution when there are few questions.

    Args:
        ours: score of each question in the first run, 0..1.
        theirs: scores of the second run, for the same questions in the same order.

    Returns:
        (difference, low, high), ours minus theirs, in -1..1.

    Raises:
        ValueError: if the lengths differ or are 0.

    Source: Zou and Donner, "Construction of confidence limits about effect measures" (2008), equation for the
    difference of two parameters with correlated estimates; gains and losses exclude each other, so the correlation of
    their means is -sqrt(g l / ((1 - g) (1 - l))).
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} answers cannot be paired; give the same questions, at least one"
        )
    n = len(ours)
    gaps = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    up, down = sum(g for g in gaps if g > 0), -sum(g for g in gaps if g < 0)
    gain, loss = up / n, down / n
    (gain_low, gain_high), (loss_low, loss_high) = wilson(up, n), wilson(down, n)
    apart = (1 - gain) * (1 - loss)
    link = -math.sqrt(gain * loss / apart) if apart > 0 else 0.0
    below = _mover(gain - gain_low, loss_high - loss, link)
    above = _mover(gain_high - gain, loss - loss_low, link)
    mean = gain - loss
    return mean, max(-1.0, mean - below), min(1.0, mean + above)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test that flips in both directions are equally likely.

    Under this hypothesis the number of flips in one direction is binomial with probability 1/2. The p-value is twice
    the smaller tail, at most 1. Questions with equal outcomes are not counted.

    Args:
        only_a: number of questions that only the first run answers correctly.
        only_b: number of questions that only the second run answers correctly.

    Returns:
        A probability in 0..1; 1 if there are no flips.

    Raises:
        ValueError: for negative counts.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages"
    (1947), in its exact, binomial form.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"{only_a} and {only_b} flips: counts must not be negative")
    total, term, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):  # term is the number of ways to choose k of total
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def _mover(one: float, two: float, correlation: float) -> float:
    """Return the distance of a difference from its confidence limit, given these distances for its two terms."""
    return math.sqrt(max(0.0, one * one + two * two - 2 * correlation * one * two))
