"""Checks of hyper-parameters with uniform error messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

LARGEST = 2**31 - 1
"""Upper limit of integers without a limit of their own."""
FAR = 1e6
"""Limit of the absolute value of numbers without a limit of their own; products of such numbers fit into float32."""
SEEDS = -(2**63), 2**64 - 1
"""The range of torch.manual_seed."""


def integer(name: str, value: Any, low: int = 0, high: int = LARGEST, *, none: bool = True) -> None:
    """Refuse a value that is not an integer in [low, high]; None is accepted unless `none` is False.

    Raises:
        ValueError: with the value and the limit.
    """
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        kind = {0: "a non-negative integer", 1: "a positive integer"}.get(low, f"an integer of at least {low}")
        above = isinstance(value, int) and value > high or high != LARGEST
        other = hasattr(value, "__index__") and not isinstance(value, int)  # such as numpy's integers
        raise ValueError(
            f"{name}={shown(value)}: must be {kind}{f', at most {high}' if above else ''}"
            f"{', as an int of Python' if other else ''}"
        )


def _items(name: str, values: Iterable[Any] | None, what: str) -> tuple[Any, ...] | None:
    """Return a list as a tuple; None is passed through."""
    if values is None:
        return None
    if isinstance(values, (str, dict)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={shown(values)}: must be a list of {what}")
    return tuple(values)


def integers(name: str, values: Iterable[Any] | None, low: int = 0) -> tuple[int, ...] | None:
    """Return a list of integers of at least `low` as a tuple; None is passed through.

    Raises:
        ValueError: with the value and the limit.
    """
    out = _items(name, values, "integers, as [8, 16]")
    for n in out or ():
        integer(name, n, low, none=False)
    return out


def real(name: str, value: Any, low: float = -FAR, high: float = FAR, *, none: bool = True) -> None:
    """Refuse a value that is not a number in [low, high]; None is accepted unless `none` is False.

    Raises:
        ValueError: with the value and the limits.
    """
    if value is None and none:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN fails the comparison
        raise ValueError(f"{name}={shown(value)}: must be a finite number in [{low:g}, {high:g}]")


def reals(name: str, values: Iterable[Any] | None, low: float = -FAR, high: float = FAR) -> tuple[float, ...] | None:
    """Return a list of numbers in [low, high] as a tuple; None is passed through.

    Raises:
        ValueError: with the value and the limits.
    """
    out = _items(name, values, "numbers, as [0.5, 0.25]")
    for x in out or ():
        real(name, x, low, high, none=False)
    return out


def seed(value: Any, name: str = "seed") -> None:
    """Refuse a value that is not an integer in the range of torch.manual_seed.

    Raises:
        ValueError: with the value and the range.
    """
    low, high = SEEDS
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{name}={shown(value)}: must be an integer in [{low}, {high}], the range of torch.manual_seed"
        )


def choice(name: str, value: Any, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not one of the choices; types must match, so 1 is not accepted for True.

    Raises:
        ValueError: with the choices.
    """
    if not any(isinstance(value, type(c)) and value == c for c in choices):
        raise ValueError(f"{name}={shown(value)}: must be {' or '.join(repr(c) for c in choices)}")


def at_most_one(**given: Any) -> None:
    """Refuse more than one of several arguments that fix the token counts.

    Raises:
        ValueError: with the arguments that were given.
    """
    names = [f"{k}={shown(v)}" for k, v in given.items() if v is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both fix the token counts; give one of {', '.join(given)}")


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters as results store them: numbers, strings and None as they are, others by their repr."""
    return {k: v if isinstance(v, (int, float, str, type(None))) else repr(v) for k, v in values.items()}


def shown(value: Any, width: int = 60) -> str:
    """Return the repr of a value for a message, in one line of at most `width` characters."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print very long integers
        return f"{'-' if value < 0 else ''}1e{math.floor(value.bit_length() * math.log10(2))}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a list with such an integer
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else f"{text[: width - 3]}..."
