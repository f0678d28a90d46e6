"""Flags of the command line and what their words mean: types for argparse, which make usage errors of what is wrong."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any


def flag(group: Any, env: Mapping[str, str], name: str, default: str | None, text: str, **kw: Any) -> None:
    """A flag whose default is the environment variable of the same name in capitals."""
    value = env.get(name.upper().replace("-", "_")) or default
    shown = f" (default {default})" if default is not None else ""
    group.add_argument(f"--{name}", default=value, help=text + shown, **kw)


def method(text: str) -> str:
    """A method's name. Of "folder/file.py:name" the file, which registers it, is run first."""
    from .methods.registry import from_file

    found = re.fullmatch(r"(.+\.py)(?::(.+))?", text)
    if found is None:
        return text
    try:
        there = from_file(found[1])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    name = found[2] or (there[0] if len(there) == 1 else "")
    if name.partition(":")[0] not in there:
        raise argparse.ArgumentTypeError(f"{found[1]} registers {', '.join(there)}; write {found[1]}:{there[0]}")
    return name


def names(text: str) -> list[str]:
    """Methods of a list a,b, see `method`."""
    out = [method(p.strip()) for p in text.split(",") if p.strip()]
    if not out:
        raise argparse.ArgumentTypeError("give a name or a list a,b")
    return out


def counts(text: str) -> list[int]:
    """Budgets of a list 192,128,64."""
    try:
        out = [int(p) for p in text.split(",") if p.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number or list such as 192,128,64") from None
    if not out or min(out) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: budgets are whole numbers of at least 1")
    return out


def floats(text: str) -> list[float]:
    """Numbers of a list 0,0.1,0.2."""
    try:
        return [float(p) for p in text.split(",") if p.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number or list such as 0,0.1,0.2") from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def batch(text: str) -> int | None:
    """A whole number of at least 1; None for "auto"."""
    return None if text == "auto" else positive(text)


def hyper(text: str) -> dict[str, Any]:
    """Hyper-parameters of a list name=value,name=value."""
    from .eval.plan import parse_args

    try:
        return parse_args(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
