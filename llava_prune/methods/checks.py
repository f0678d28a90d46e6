"""Checks of hyper-parameters, with one wording for all methods."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def integer(name: str, value: Any, low: int = 0, *, none: bool = True) -> None:
    """Refuse anything but an integer of at least `low`; None passes, unless `none` is False.

    Raises:
        ValueError: naming value and limit.
    """
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        kind = {0: "a non-negative integer", 1: "a positive integer"}.get(low, f"an integer of at least {low}")
        raise ValueError(f"{name}={value!r}: must be {kind}")


def integers(name: str, values: Iterable[Any] | None, low: int = 0) -> tuple[int, ...] | None:
    """A list of integers of at least `low` as a tuple; None passes.

    Raises:
        ValueError: naming value and limit.
    """
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r}: must be a list of integers")
    out = tuple(values)
    for n in out:
        integer(name, n, low, none=False)
    return out


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, none: bool = True) -> None:
    """Refuse anything but a finite number in [low, high]; None passes, unless `none` is False.

    Raises:
        ValueError: naming value and limits.
    """
    if value is None and none:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        limits = "" if math.isinf(low) else f" of at least {low:g}" if math.isinf(high) else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name}={value!r}: must be a finite number{limits}")


def choice(name: str, value: Any, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ValueError: listing them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be {' or '.join(repr(c) for c in choices)}")


def at_most_one(**given: Any) -> None:
    """Refuse two arguments that fix the same thing.

    Raises:
        ValueError: naming those that were given.
    """
    names = [f"{k}={v!r}" for k, v in given.items() if v is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both fix the token counts; give one of {', '.join(given)}")
