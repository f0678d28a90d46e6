"""Flags of the command line: defaults, and types for argparse.

This module imports nothing heavy, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from .methods.checks import seed as check_seed
from .methods.checks import shown
from .ops.counts import FlopsShare, TokenShare

TINY = "playground/models/llava-tiny"
"""The checkpoint that is part of the repository."""
DATA = "playground/data/mini"
"""The benchmark files that are part of the repository."""
RESULTS = "playground/results"
"""Folder of all results."""
FORMATS = ("text", "markdown", "latex", "csv")
"""Output formats of tables."""
FIGURES = ("accuracy-flops", "accuracy-tokens", "retention", "information", "survival", "speed", "sweep")
"""Names of the figures of `llava-prune figure`."""
_OPENING, _CLOSING = "[({", "])}"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
MOST = 1_000_000
"""Upper limit of numbers without a limit of their own."""


def flag(group: Any, env: Mapping[str, str], name: str, default: str | None, text: str, **kw: Any) -> None:
    """Add a flag whose default is the environment variable of the same name in capitals."""
    value = env.get(name.upper().replace("-", "_")) or default
    shown = f" (default {default})" if default else ""
    group.add_argument(f"--{name}", default=value, help=text + shown, **kw)


def switch(group: Any, env: Mapping[str, str], name: str, text: str) -> None:
    """Add a flag without a value; the environment variable of the same name in capitals may be 1 or 0."""
    added = group.add_argument(f"--{name}", action="store_true", help=text)
    added.default, added.type = env.get(name.upper().replace("-", "_")) or "0", _switched


def _switched(text: str) -> bool:
    """Return whether the value of an environment variable turns a flag on."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or 0")
    return text == "1"


def add_placement(group: Any, env: Mapping[str, str]) -> None:
    """Add the flags for models that do not fit on one GPU."""
    what = "spread over GPUs, memory and disk: auto, balanced, balanced_low_0 or sequential"
    flag(group, env, "device-map", None, what)
    switch(group, env, "load-8bit", "quantise to 8 bit (bitsandbytes)")
    switch(group, env, "load-4bit", "quantise to 4 bit (bitsandbytes, nf4)")
    flag(group, env, "engine", None, "split over the processes of torchrun: deepspeed or tp (transformers' own)")


# methods ----------------------------------------------------------------------------------------------------------


def method(text: str) -> str:
    """Return a method's name. For "folder/file.py:name", the file is executed first, which registers the method."""
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
    """Return the methods of a list a,b, see `method`."""
    out = [method(p) for p in words(text)]
    if not out:
        raise argparse.ArgumentTypeError("give a name or a list a,b")
    return out


def words(text: str) -> list[str]:
    """Return the words of a list a,b."""
    out = [p.strip() for p in text.split(",") if p.strip()]
    if not out:
        raise argparse.ArgumentTypeError("give a name or a list a,b")
    return out


# hyper-parameters -------------------------------------------------------------------------------------------------


class MethodArgs(argparse.Action):
    """`--method-args name=value,name=value`. The flag may be repeated, but each name may be given only once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        before = before if isinstance(before, dict) else {}  # a text is the default, which the first flag replaces
        for name in before.keys() & values.keys():
            raise argparse.ArgumentError(self, _twice(name))
        setattr(namespace, self.dest, {**before, **values})


def add_method_args(group: Any, env: Mapping[str, str], example: str, *aliases: str) -> None:
    """Add the flag for hyper-parameters, which is spelt the same in every command; its default is METHOD_ARGS."""
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
    """Parse hyper-parameters with `parse_args`, raising argparse's error."""
    try:
        return parse_args(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(text: str) -> dict[str, Any]:
    """Parse hyper-parameters such as "mi_scale=8,budget=after,layers=[8,16,24]"; values are read as YAML.

    Raises:
        ValueError: for a part without "=", a list of values without brackets, a repeated name, or a missing or invalid
            value.
    """
    out: dict[str, Any] = {}
    last = ""
    for part in filter(None, (p.strip() for p in _parts(text))):
        name, sign, value = (p.strip() for p in part.partition("="))
        if not sign and last:
            raise ValueError(
                f"{shown(f'{last},{part}')}: one value is taken for each hyper-parameter; use llava-prune sweep "
                f"for several values, or write a sequence in brackets, as {last.partition('=')[0]}=[8,16]"
            )
        if not sign or not name.isidentifier():
            raise ValueError(f"{shown(part)} is not a hyper-parameter; write name=value, several separated by commas")
        if name in out:
            raise ValueError(_twice(name))
        if not value:
            raise ValueError(f"{shown(part)} has no value; write {name}=null for None")
        out[name] = _value(part, value)
        last = part
    return out


def _twice(name: str) -> str:
    return f"{name} is given twice; one value is taken for each hyper-parameter; use llava-prune sweep for several"


def _parts(text: str) -> list[str]:
    """Split `text` at the commas outside of brackets."""
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
        raise ValueError(f"{shown(text)}: the brackets do not match; write a sequence as layers=[8,16,24]")
    return out


@functools.lru_cache(maxsize=1)
def _loader() -> Any:
    """Return a YAML loader for numbers as people write them: it reads 1e-9, but not 1_0 (10), 1:30 (90) or 010 (8).

    A repeated key is an error.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys: list[Any] = []
            for key, _ in node.value:
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                keys.append(key.value)
            return super().construct_mapping(node, deep)

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("bool", "null")]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    digits = list("-+0123456789")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"({_INTEGER.pattern})$"), digits)
    patterns = f"(?![-+]?[0-9]+$)({_FLOAT.pattern}|{_NOT_FINITE.pattern})$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(patterns), [*digits, "."])
    return Loader


def load_yaml(text: str) -> Any:
    """Parse the text of a YAML file, with numbers as in `parse_args`.

    Raises:
        ValueError: naming the line, if the text cannot be read.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except Exception as error:  # yaml's own errors and those of its constructors
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"{where}is not YAML ({problem})") from error


def _value(part: str, text: str) -> Any:
    import yaml

    if text[0] == "(" and text[-1] == ")":
        text = f"[{text[1:-1]}]"
    try:
        return yaml.load(text, _loader())
    except Exception as error:  # yaml's own errors and those of its constructors
        raise ValueError(
            f"{shown(part)}: the value cannot be read; give a number, true, false, null or a word"
        ) from error


# numbers ----------------------------------------------------------------------------------------------------------


def whole(low: int, high: int = MOST) -> Callable[[str], int]:
    """Return a type for integers in [low, high], written with the digits 0 to 9."""
    kind = {0: "a non-negative integer", 1: "a positive integer"}.get(low, f"an integer of at least {low}")

    def read(text: str) -> int:
        digits = text.strip().lstrip("0") or text.strip()[-1:]
        plain = re.fullmatch("[0-9]+", digits) is not None
        if plain and len(digits) <= len(str(high)) and low <= int(digits) <= high:
            return int(digits)
        above = f", at most {high}" if plain and digits != "0" else ""
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be {kind}{above}")

    return read


positive = whole(1)
natural = whole(0)
any_length = whole(1, 10**9)
"""Type for counts that may be large without cost, such as --limit."""


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a type for numbers in [low, high], written with the digits 0 to 9."""

    def read(text: str) -> float:
        text = text.strip()
        value = float(text) if _FLOAT.fullmatch(text) else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number in [{low:g}, {high:g}]")
        return value

    return read


def _list(one: Callable[[str], Any], example: str) -> Callable[[str], list[Any]]:
    """Return a type for a value or a list a,b of values."""

    def read(text: str) -> list[Any]:
        parts = [p for p in text.split(",") if p.strip()]
        try:
            return [one(p) for p in parts or [text]]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; a list is written as {example}") from None

    return read


counts = _list(positive, "192,128,64")
"""Type for a list of positive integers, e.g. 192,128,64."""
floats = _list(number(0, MOST), "0,0.1,0.2")
"""Type for a list of numbers, e.g. 0,0.1,0.2."""
layers = _list(natural, "0,4,11")
"""Type for a list of layer indices."""
percents = _list(number(0, 100), "42.9,33.7,23.2")
"""Type for a list of percentages."""


def _share(text: str) -> float:
    """Parse a percentage above 0 with its percent sign."""
    value = number(0, 100)(text.strip().removesuffix("%"))
    if not text.strip().endswith("%") or value == 0:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a percentage above 0, written as 49%")
    return value


def _budget(text: str) -> int | TokenShare:
    return TokenShare(_share(text)) if text.strip().endswith("%") else positive(text)


budgets = _list(_budget, "192,128,64")
"""Type for a list of budgets, e.g. 192,11%: numbers of visual tokens, or percentages of them."""
flops_budgets = _list(lambda text: FlopsShare(_share(text)), "49%,25%")
"""Type for a list of budgets, e.g. 49%,25%: percentages of the unpruned model's FLOPs."""


def seed(text: str) -> int:
    """Parse an integer that torch.manual_seed accepts."""
    given = text.strip()
    value = int(given) if _INTEGER.fullmatch(given) and len(given) < 100 else given
    try:
        check_seed(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace("seed=", "", 1)) from None
    assert isinstance(value, int)
    return value


def batch(text: str) -> int | None:
    """Parse a positive integer; return None for "auto"."""
    return None if text.strip() == "auto" else positive(text)
