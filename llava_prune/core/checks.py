"""Checks of hyper-parameters, with one wording for all methods."""

from __future__ import annotations

import math
from typing import Any


def whole(name: str, value: Any, low: int = 0) -> None:
    """Refuse what is no whole number of at least `low`; None passes.

    Raises:
        ValueError: naming value and limit.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise ValueError(f"{name}={value!r}: give a whole number of at least {low}")


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse what is no finite number in [low, high]; None passes.

    Raises:
        ValueError: naming value and limits.
    """
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        limits = "" if math.isinf(low) else f" of at least {low:g}" if math.isinf(high) else f" in {low:g}..{high:g}"
        raise ValueError(f"{name}={value!r}: give a finite number{limits}")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices.

    Raises:
        ValueError: listing them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose {' or '.join(repr(c) for c in choices)}")


def at_most_one(**given: Any) -> None:
    """Refuse two arguments that fix the same thing.

    Raises:
        ValueError: naming those that were given.
    """
    names = [f"{k}={v!r}" for k, v in given.items() if v is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both fix the counts; give one of {', '.join(given)}")
