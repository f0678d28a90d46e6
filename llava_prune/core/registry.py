"""Names of methods. A method registers itself in its own file; nothing else lists it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from .compose import compose, split
from .method import Method

_METHODS: dict[str, type[Method]] = {}
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, *, presets: dict[str, dict[str, Any]] | None = None) -> Callable[[M], M]:
    """Class decorator: make a Method known under `name`.

    Args:
        name: what users write in `pruned(model, name)`.
        presets: further names for fixed hyper-parameters, `{"strict": {...}}` becomes "name:strict".

    Raises:
        ValueError: when the name is taken by another class or the class is not a Method.
    """

    def add(cls: M) -> M:
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise ValueError(f"{cls!r} is no subclass of llava_prune.Method")
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
    package = importlib.import_module("llava_prune.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def names(presets: bool = False) -> list[str]:
    """Names of all known methods, sorted; with `presets=True` also the "name:preset" forms."""
    _discover()
    out = sorted(_METHODS)
    if presets:
        out += sorted(f"{n}:{p}" for n, table in _PRESETS.items() for p in table)
    return out


def lookup(name: str) -> type[Method]:
    """The class registered under `name`, or the one of a composition like "visionzip+autoprune".

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    _discover()
    parts = None if name in _METHODS else split(name, _METHODS.__contains__)
    if parts is not None:
        return compose(name, _METHODS[parts[0]], _METHODS[parts[1]])
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


def presets(name: str) -> dict[str, dict[str, Any]]:
    """The presets of the method `name`: preset -> hyper-parameters.

    Raises:
        ValueError: for an unknown name.
    """
    lookup(name)
    return {preset: dict(values) for preset, values in _PRESETS.get(name, {}).items()}


def build(name: str, **hyper: Any) -> Method:
    """A new instance of the method `name` ("name", "name:preset", or "first+second", see `Composed`).

    Args:
        hyper: hyper-parameters; they override the preset's.

    Raises:
        ValueError: for an unknown name, preset or hyper-parameter, or a value out of range.
    """
    base, _, preset = name.partition(":")
    cls = lookup(base)
    table = _PRESETS.get(base, {})
    if preset and preset not in table:
        raise ValueError(f"{base!r} has no preset {preset!r}; it has {sorted(table) or 'none'}")
    values = {**(table[preset] if preset else {}), **hyper}
    known = inspect.signature(cls).parameters
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{base!r} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in values]
    if missing:
        raise ValueError(f"{base!r} needs {', '.join(missing)}")
    return cls(**values)
