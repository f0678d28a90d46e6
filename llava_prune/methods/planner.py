"""Methods x presets x budgets x hyper-parameters, turned into runs. Every command plans with this module."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Method
from .registry import build, names, resolve, takes_budget

ALL = "all"
"""In place of a name: every registered method."""
REFERENCE = "full"
"""The unpruned model."""


@dataclass(frozen=True)
class Case:
    """One method at one budget, not built yet.

    Attributes:
        label: e.g. "autoprune-64" or "fastv-paper"; unique in a plan, and the name of the folder of results.
        name: name of the method, with its preset.
        tokens: budget, None where the method has none or its hyper-parameters fix the counts.
        hyper: hyper-parameters besides those of the preset.
    """

    label: str
    name: str
    tokens: int | None
    hyper: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One method at one budget.

    Attributes:
        label, name, tokens: see Case.
        method: the instance.
    """

    label: str
    name: str
    tokens: int | None
    method: Method


def expand(given: Iterable[str], reference: bool = False) -> list[str]:
    """Names in order, each once, "all" replaced by every registered method.

    Args:
        given: names, "name:preset" forms, compositions or "all".
        reference: put the unpruned model first.

    Raises:
        ValueError: when no name is left.
    """
    found = list(dict.fromkeys(n for g in given for n in (names() if g == ALL else [g])))
    if reference:
        found = [REFERENCE, *(n for n in found if n != REFERENCE)]
    if not found:
        raise ValueError(f"no method given; choose from {', '.join(names())}")
    return found


def cases(
    given: Iterable[str],
    budgets: Sequence[int],
    method_args: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    reference: bool = False,
) -> list[Case]:
    """Every method at every budget.

    A preset that states `tokens` has that budget only. A preset or hyper-parameters that fix the counts otherwise, and
    methods without a budget, give a single case without one.

    Args:
        given: see `expand`.
        budgets: visual token budgets, at least one; each counts once.
        method_args: hyper-parameters for every method that has them; they override presets and `defaults`.
        seed: for every method that draws and is not given another.
        defaults: method name -> hyper-parameters; those of its parts hold in a composition, too.
        reference: put the unpruned model first.

    Raises:
        ValueError: for an unknown method or preset, a hyper-parameter that none of the methods has, no method, no
            budget, or two cases with the same label.
    """
    chosen, values, stated = expand(given, reference), dict(method_args or {}), defaults or {}
    if not budgets:
        raise ValueError("no budget given; TOKENS is a number of visual tokens or a list, e.g. 192,128,64")
    if "tokens" in values:
        raise ValueError(f"METHOD_ARGS tokens={values['tokens']!r}: the budget has a flag of its own; use TOKENS")
    resolved = {name: resolve(name) for name in chosen}
    _check_known(chosen, [cls for cls, _ in resolved.values()], values)
    out: list[Case] = []
    for name, (cls, preset) in resolved.items():
        known = inspect.signature(cls).parameters
        tables = [stated.get(part.name, {}) for part in (*getattr(cls, "parts", ()), cls)]
        hyper = {k: v for table in (*tables, values) for k, v in table.items() if k in known and k != "tokens"}
        if seed is not None and "seed" in known:
            hyper.setdefault("seed", seed)
        own: list[int | None] = [preset["tokens"]] if "tokens" in preset else [*dict.fromkeys(budgets)]
        for tokens in own if takes_budget(cls, {**preset, **hyper}) else [None]:
            label = name.replace(":", "-") + ("" if tokens is None else f"-{tokens}")
            out.append(Case(label, name, tokens, dict(hyper)))
    _check_labels(out)
    return out


def plan(found: Iterable[Case]) -> list[Run]:
    """Build every case; see `cases`.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """
    return [Run(c.label, c.name, c.tokens, _built(c)) for c in found]


def check_budgets(runs: Iterable[Run], limit: int) -> None:
    """Refuse budgets above the visual tokens of an image.

    Raises:
        ValueError: naming the limit.
    """
    for run in runs:
        if run.tokens is not None and run.tokens > limit:
            raise ValueError(
                f"TOKENS={run.tokens}: an image has {limit} visual tokens in this model; give {limit} or fewer"
            )


def _built(case: Case) -> Method:
    budget = {} if case.tokens is None else {"tokens": case.tokens}
    return build(case.name, **{**case.hyper, **budget})


def _check_known(chosen: Sequence[str], classes: Sequence[type[Method]], values: Mapping[str, Any]) -> None:
    known = sorted({k for cls in classes for k in inspect.signature(cls).parameters} - {"tokens"})
    stray = sorted(set(values) - set(known))
    if stray:
        raise ValueError(
            f"METHOD_ARGS: none of {', '.join(chosen)} has a hyper-parameter {', '.join(stray)}; "
            f"known are {', '.join(known) or 'none'}"
        )


def _check_labels(found: Sequence[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in found:
        other = seen.setdefault(case.label, case)
        if other is not case:
            raise ValueError(
                f"{other.name} and {case.name} have the same label, {case.label!r}, which names the folder of results; "
                "run them one by one, with another OUT each"
            )
