"""Turn methods, presets, budgets and hyper-parameters into runs. Every command plans its runs with this module."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from ..ops.counts import Size
from .base import Method
from .budgets import Budget, tokens_for
from .registry import build, names, resolve, takes_budget

ALL = "all"
"""The name that stands for every registered method."""
REFERENCE = "full"
"""Name of the method that leaves the model unpruned."""


@dataclass(frozen=True)
class Request:
    """A request to run some methods at some budgets.

    Attributes:
        methods: names; see `expand`.
        budgets: budgets; each method runs at each of them.
        hyper: hyper-parameters of this request only; they become part of the labels.
    """

    methods: Sequence[str]
    budgets: Sequence[Budget]
    hyper: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One method at one budget, before the method is built.

    Attributes:
        label: e.g. "autoprune-64" or "fastv-paper"; unique in a plan, and the name of the results folder.
        name: name of the method, with its preset.
        tokens: budget; None if the method has no budget or its hyper-parameters fix the counts.
        hyper: hyper-parameters besides those of the preset.
    """

    label: str
    name: str
    tokens: int | None
    hyper: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One method at one budget, ready to run.

    Attributes:
        label, name, tokens: see Case.
        method: the method instance.
    """

    label: str
    name: str
    tokens: int | None
    method: Method


def expand(given: Iterable[str], reference: bool = False) -> list[str]:
    """Return the names in order without duplicates, with "all" replaced by every registered method.

    Args:
        given: names, "name:preset" forms, compositions or "all".
        reference: put the unpruned model first.

    Raises:
        ValueError: if there are no names.
    """
    found = list(dict.fromkeys(n for g in given for n in (names() if g == ALL else [g])))
    if reference:
        found = [REFERENCE, *(n for n in found if n != REFERENCE)]
    if not found:
        raise ValueError(f"no method given; choose from {', '.join(names())}")
    return found


def cases(
    given: Iterable[str],
    budgets: Sequence[Budget],
    method_args: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    reference: bool = False,
    size: Size | None = None,
) -> list[Case]:
    """Return a case for every method at every budget.

    A preset that states `tokens` runs at that budget only. If a preset or the hyper-parameters fix the counts in
    another way, or if the method takes no budget, there is a single case without a budget.

    Args:
        given: names; see `expand`.
        budgets: visual token budgets, at least one; duplicates are dropped.
        method_args: hyper-parameters for every method that has them; they override presets and `defaults`.
        seed: seed of every method that takes one and is not given another.
        defaults: method name -> hyper-parameters; a composition also takes those of its parts.
        reference: put the unpruned model first.
        size: sizes of the model, for budgets that depend on it.

    Raises:
        ValueError: for an unknown method or preset, a hyper-parameter that none of the methods has, no method, no
            budget, a budget that a method does not support, or two cases with the same label.
    """
    requests = [Request(expand(given, reference), budgets)]
    return cases_of(requests, method_args, seed=seed, defaults=defaults, size=size)


def cases_of(
    requests: Iterable[Request],
    method_args: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    size: Size | None = None,
) -> list[Case]:
    """Return the cases of several requests without duplicates; see `cases`.

    Hyper-parameters of a request override `method_args`.
    """
    requests, shared = list(requests), dict(method_args or {})
    _check_known("METHOD_ARGS", [n for r in requests for n in expand(r.methods)], shared)
    out: dict[str, Case] = {}
    for request in requests:
        for case in _cases(request, shared, seed, defaults or {}, size):
            other = out.setdefault(case.label, case)
            if other != case:
                raise ValueError(
                    f"{other.name} and {case.name} have the same label, {case.label!r}, which names the folder of "
                    "results; run them one by one, each with another folder (OUT or --out)"
                )
    return list(out.values())


def _cases(
    request: Request,
    shared: dict[str, Any],
    seed: int | None,
    stated: Mapping[str, Mapping[str, Any]],
    size: Size | None,
) -> Iterable[Case]:
    if not request.budgets:
        raise ValueError("no budget given; TOKENS is a number of visual tokens or a list, e.g. 192,128,64")
    chosen = expand(request.methods)
    _check_known("hyper-parameters", chosen, request.hyper)
    for name in chosen:
        cls, preset = resolve(name)
        known = inspect.signature(cls).parameters
        tables = [stated.get(part.name, {}) for part in (*getattr(cls, "parts", ()), cls)]
        base = {k: v for table in (*tables, shared) for k, v in table.items() if k in known and k != "tokens"}
        if seed is not None and "seed" in known:
            base.setdefault("seed", seed)
        before = {**{k: p.default for k, p in known.items()}, **preset, **base}
        named = {k: v for k, v in request.hyper.items() if k in known and before[k] != v}
        hyper = {**base, **named}
        own: Sequence[int | None] = [None]
        if takes_budget(cls, {**preset, **hyper}):
            own = [preset["tokens"]] if "tokens" in preset else _budgets(request.budgets, name, hyper, size)
        for tokens in own:
            yield Case(_label(name, tokens, named), name, tokens, dict(hyper))


def _budgets(given: Sequence[Budget], name: str, hyper: Mapping[str, Any], size: Size | None) -> list[int]:
    return [*dict.fromkeys(tokens_for(budget, name, hyper, size) for budget in given)]


def _label(name: str, tokens: int | None, hyper: Mapping[str, Any]) -> str:
    """Return the label of a case, a valid folder name such as "autoprune-64" or "autoprune-64,gamma=0.1"."""
    parts = [name.replace(":", "-") + ("" if tokens is None else f"-{tokens}")]
    parts += [f"{k}={json.dumps(v, default=repr)}" for k, v in hyper.items()]
    label = ",".join(parts).replace('"', "").replace(" ", "")
    if len(label) <= 100 and re.fullmatch(r"[\w.,=+\-\[\]]+", label[len(parts[0]) :] or "-"):
        return label
    return f"{parts[0]},{sha256(label.encode()).hexdigest()[:8]}"


def plan(found: Iterable[Case]) -> list[Run]:
    """Build every case; see `cases`.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """
    return [Run(c.label, c.name, c.tokens, _built(c)) for c in found]


def check_budgets(runs: Iterable[Run], limit: int) -> None:
    """Refuse budgets above the number of visual tokens of an image.

    Raises:
        ValueError: with the limit.
    """
    for run in runs:
        if run.tokens is not None and run.tokens > limit:
            raise ValueError(
                f"TOKENS={run.tokens}: an image has {limit} visual tokens in this model; give {limit} or fewer"
            )


def check_schedules(runs: Iterable[Run], n_visual: int, n_layers: int) -> None:
    """Refuse methods that cannot reach their budget on a model, before anything is computed.

    Raises:
        ValueError: naming the run.
    """
    for run in runs:
        try:
            run.method.example(n_visual, n_layers)
        except ValueError as error:
            raise ValueError(f"{run.label}: {error}") from error


def _built(case: Case) -> Method:
    budget = {} if case.tokens is None else {"tokens": case.tokens}
    return build(case.name, **{**case.hyper, **budget})


def _check_known(where: str, chosen: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that none of the methods has.

    Raises:
        ValueError: with their names, and with `where` they were given.
    """
    classes = [resolve(name)[0] for name in chosen]
    if "tokens" in values:
        raise ValueError(
            f"{where} tokens={values['tokens']!r}: the budget has a flag of its own; use TOKENS or --tokens"
        )
    known = sorted({k for cls in classes for k in inspect.signature(cls).parameters} - {"tokens"})
    stray = sorted(set(values) - set(known))
    if stray:
        raise ValueError(
            f"{where}: none of {', '.join(dict.fromkeys(chosen))} has a hyper-parameter {', '.join(stray)}; "
            f"known are {', '.join(known) or 'none'}"
        )
