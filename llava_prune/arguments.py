"""Flags of the command line: defaults, and types for argparse. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

TINY = "playground/models/llava-tiny"
"""The checkpoint that is part of the repository."""
DATA = "playground/data/mini"
"""The benchmark files that are part of the repository."""
RESULTS = "playground/results"
"""Folder of all results."""
_OPENING, _CLOSING = "[({", "])}"
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers such as 1e-9, which YAML 1.1 reads as text."""


def flag(group: Any, env: Mapping[str, str], name: str, default: str | None, text: str, **kw: Any) -> None:
    """A flag whose default is the environment variable of the same name in capitals."""
    value = env.get(name.upper().replace("-", "_")) or default
    shown = f" (default {default})" if default else ""
    group.add_argument(f"--{name}", default=value, help=text + shown, **kw)


# methods ----------------------------------------------------------------------------------------------------------


def method(text: str) -> str:
    """A method's name. Of "folder/file.py:name" the file, which registers it, is run first."""
    found = re.fullmatch(r"(.+\.py)(?::(.+))?", text)
    if found is None:
        return text
    from .methods.registry import from_file

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


# hyper-parameters -------------------------------------------------------------------------------------------------


class MethodArgs(argparse.Action):
    """`--method-args name=value,name=value`; the flag may be repeated, each name may be given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        before = before if isinstance(before, dict) else {}  # text: the default, which a flag replaces
        for name in before.keys() & values.keys():
            raise argparse.ArgumentError(self, _twice(name))
        setattr(namespace, self.dest, {**before, **values})


def add_method_args(group: Any, env: Mapping[str, str], example: str, *aliases: str) -> None:
    """The flag for hyper-parameters, spelt the same in every command; its default is METHOD_ARGS."""
    text = f"hyper-parameters, one value each, e.g. {example}; a sequence is written as layers=[8,16,24]"
    group.add_argument(
        "--method-args",
        *aliases,
        default=env.get("METHOD_ARGS") or "",
        type=hyper,
        action=MethodArgs,
        metavar="NAME=VALUE",
        help=text,
    )


def hyper(text: str) -> dict[str, Any]:
    """`parse_args` for argparse."""
    try:
        return parse_args(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(text: str) -> dict[str, Any]:
    """Hyper-parameters of a list "mi_scale=8,budget=after,layers=[8,16,24]"; values are read as YAML.

    Raises:
        ValueError: for a part without "=", a list of values without brackets, a name that is given twice, a missing
            value, or one that cannot be read.
    """
    out: dict[str, Any] = {}
    last = ""
    for part in filter(None, (p.strip() for p in _parts(text))):
        name, sign, value = (p.strip() for p in part.partition("="))
        if not sign and last:
            raise ValueError(
                f"'{last},{part}': one value is taken for each hyper-parameter; run the command once for each value, "
                f"with another OUT, or write a sequence in brackets, as {last.partition('=')[0]}=[8,16]"
            )
        if not sign or not name.isidentifier():
            raise ValueError(f"{part!r} is not a hyper-parameter; write name=value, several separated by commas")
        if name in out:
            raise ValueError(_twice(name))
        if not value:
            raise ValueError(f"{part!r} has no value; write {name}=null for None")
        out[name] = _value(part, value)
        last = part
    return out


def _twice(name: str) -> str:
    return f"{name} is given twice; one value is taken for each hyper-parameter, run the command once for each value"


def _parts(text: str) -> list[str]:
    """`text` cut at the commas outside brackets."""
    out, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            out.append("")
        else:
            out[-1] += letter
    if depth:
        raise ValueError(f"{text!r}: the brackets do not match; write a sequence as layers=[8,16,24]")
    return out


def _value(part: str, text: str) -> Any:
    import yaml

    if text[0] == "(" and text[-1] == ")":
        text = f"[{text[1:-1]}]"
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{part!r}: the value cannot be read; give a number, true, false, null or a word") from error
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


# numbers ----------------------------------------------------------------------------------------------------------


def counts(text: str) -> list[int]:
    """Positive integers of a list 192,128,64."""
    try:
        out = [int(p) for p in text.split(",") if p.strip()]
    except ValueError:
        out = []
    if not out or min(out) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive integer or a list of them, e.g. 192,128,64")
    return out


def floats(text: str) -> list[float]:
    """Numbers of a list 0,0.1,0.2."""
    try:
        return [float(p) for p in text.split(",") if p.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number or a list of them, e.g. 0,0.1,0.2") from None


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive integer")
    return int(text)


def batch(text: str) -> int | None:
    """A positive integer; None for "auto"."""
    return None if text == "auto" else positive(text)
