"""Confidence intervals of accuracies and mean scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Args:
        right: number of successes, 0..total.
        total: number of trials; 0 gives (0, 1).

    Returns:
        (low, high) within 0..1.

    Raises:
        ValueError: when right is outside 0..total.
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
    """95 % interval of a mean of scores in 0..1: Wilson's where all are 0 or 1, otherwise the normal approximation.

    Args:
        values: one score for each question; none gives (0, 1).

    Returns:
        (low, high) within 0..1.
    """
    n = len(values)
    if all(v in (0, 1) for v in values):
        return wilson(int(sum(values)), n)
    mean = sum(values) / n
    half = 1.0 if n == 1 else Z95 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def share(right: Sequence[bool]) -> dict[str, Any]:
    """Percentage of right answers with its interval; accuracy is None without answers."""
    low, high = wilson(sum(right), len(right))
    value = 100 * sum(right) / len(right) if right else None
    return {"accuracy": value, "low": 100 * low, "high": 100 * high, "right": sum(right), "rows": len(right)}


def average(values: Sequence[float]) -> dict[str, Any]:
    """Mean in percent of scores in 0..1, with its interval; accuracy is None without scores."""
    low, high = mean_interval(values)
    value = 100 * sum(values) / len(values) if values else None
    return {"accuracy": value, "low": 100 * low, "high": 100 * high, "rows": len(values)}


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two runs on the same questions, with its paired 95 % interval (normal approximation).

    Args:
        ours: score of each question, 0..1.
        theirs: the same questions in the same order.

    Returns:
        (difference, low, high), ours minus theirs, in -1..1.

    Raises:
        ValueError: when the lengths differ or are 0.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} answers cannot be paired; give the same questions, at least one"
        )
    n = len(ours)
    gaps = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / n
    if n == 1:
        return mean, -1.0, 1.0
    variance = sum((g - mean) ** 2 for g in gaps) / (n - 1)
    half = Z95 * math.sqrt(variance / n)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)
