"""The registry of methods by name. Each method registers itself in its own file; there is no other list."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from .base import Method
from .checks import shown
from .compose import compose, split

_METHODS: dict[str, type[Method]] = {}
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, *, presets: dict[str, dict[str, Any]] | None = None) -> Callable[[M], M]:
    """Register a Method class under `name`; use it as a class decorator.

    Args:
        name: the name that users write in `pruned(model, name)`.
        presets: published settings by name; `{"strict": {...}}` makes "name:strict" known. Budgets need no preset:
            "name:192" is `tokens=192`.

    Raises:
        ValueError: if the name is taken by another class, or if the class is not a Method.
    """

    def add(cls: M) -> M:
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise ValueError(f"{cls!r} is not a subclass of llava_prune.Method")
        known = _METHODS.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if known is not None and not same:
            raise ValueError(f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another")
        cls.name = name
        _METHODS[name] = cls
        _PRESETS[name] = dict(presets or {})
        return cls

    return add


def _discover() -> None:
    """Import every module of the package."""
    _import_all(tuple(importlib.import_module("llava_prune.methods").__path__))


@functools.cache
def _import_all(folders: tuple[str, ...]) -> None:
    """Import every module of some folders once. The result is cached, since a budget search builds many methods."""
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"llava_prune.methods.{module.name}")


def names(presets: bool = False) -> list[str]:
    """Return the sorted names of all known methods; with `presets=True` also the "name:preset" forms."""
    _discover()
    out = sorted(_METHODS)
    if presets:
        out += sorted(f"{n}:{p}" for n, table in _PRESETS.items() for p in table)
    return out


def _known(text: str) -> bool:
    """Return whether `text` is "name" or "name:preset" with a registered name; the preset is not checked."""
    name, _, preset = text.partition(":")
    return name in _METHODS and "+" not in preset


def resolve(name: str) -> tuple[type[Method], dict[str, Any]]:
    """Return class and preset hyper-parameters of "name", "name:preset" or "name:192", or two of these joined by "+".

    In a composition, `tokens` in the preset of the first part becomes `vision_tokens` (see `Composed`).

    Raises:
        ValueError: for an unknown name or preset, or parts that cannot be combined.
    """
    if not isinstance(name, str):
        raise ValueError(f"{shown(name)} is not the name of a method; give a text, as 'fastv' or 'fastv:192'")
    _discover()
    if name.endswith(":"):
        raise ValueError(f"{shown(name)}: no preset after the colon; write {shown(name[:-1])}, or a preset after it")
    if _known(name):
        base, _, preset = name.partition(":")
        return _METHODS[base], _preset(base, preset) if preset else {}
    parts = split(name, _known)
    if parts is None:
        hint = "; join one before the language model and one inside it, as 'visionzip+autoprune'" if "+" in name else ""
        raise ValueError(f"unknown method {shown(name)}; known are {', '.join(sorted(_METHODS))}{hint}")
    (first, before), (second, inside) = map(resolve, parts)
    before = {"vision_tokens" if k == "tokens" else k: v for k, v in before.items()}
    return compose(f"{first.name}+{second.name}", first, second), {**before, **inside}


def _preset(name: str, preset: str) -> dict[str, Any]:
    """Return the hyper-parameters of a preset; a number stands for a budget."""
    table = _PRESETS[name]
    if preset in table:
        return dict(table[preset])
    budget = "tokens" in inspect.signature(_METHODS[name]).parameters
    if budget and re.fullmatch("[1-9][0-9]{0,9}", preset):
        return {"tokens": int(preset)}
    known = [*sorted(table), *(["a number of tokens, as 64"] if budget else [])]
    raise ValueError(f"{name!r} has no preset {shown(preset)}; it has {', '.join(known) or 'none'}")


def takes_budget(cls: type[Method], values: Mapping[str, Any]) -> bool:
    """Return whether a method takes `tokens` and none of these hyper-parameters fixes the token counts."""
    return "tokens" in inspect.signature(cls).parameters and not values.keys() & set(cls.fixes_budget)


def presets(name: str) -> dict[str, dict[str, Any]]:
    """Return the presets of the method `name`: preset -> hyper-parameters.

    Raises:
        ValueError: for an unknown name.
    """
    cls, _ = resolve(name)
    return {preset: dict(values) for preset, values in _PRESETS.get(cls.name, {}).items()}


def build(name: str, **hyper: Any) -> Method:
    """Build an instance of the method `name`.

    Args:
        name: see `resolve`.
        hyper: hyper-parameters; they override those of the preset.

    Raises:
        ValueError: for an unknown name, preset or hyper-parameter, or a value out of range.
    """
    cls, preset = resolve(name)
    values = {**preset, **hyper}
    known = inspect.signature(cls).parameters
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.name!r} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
        )
    missing = [k for k, p in known.items() if p.default is p.empty and k not in values]
    if missing:
        raise ValueError(f"{cls.name!r} needs {', '.join(missing)}")
    return cls(**values)


def from_file(path: str | Path) -> list[str]:
    """Run a Python file that registers methods and return the registered names.

    Raises:
        ValueError: if the file cannot be run or registers no method.
    """
    _discover()
    try:
        path = Path(path).expanduser().resolve()
        source = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # unreadable file, unknown ~user, null byte in the path
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    module = ModuleType(f"llava_prune_file_{path.stem}")  # a name that does not shadow another module
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module here
    before = dict(_METHODS), dict(_PRESETS)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        _METHODS.clear()
        _PRESETS.clear()
        _METHODS.update(before[0])
        _PRESETS.update(before[1])
        text = " ".join(str(error).split())
        raise ValueError(f"{path} could not be run: {type(error).__name__}: {text}") from error
    new = sorted(n for n, cls in _METHODS.items() if cls.__module__ == module.__name__)
    if not new:
        raise ValueError(f'{path} registers no method; put @register("name") over a subclass of llava_prune.Method')
    return new
