"""The table of methods: where they prune, how many tokens each layer has, and what a prefill costs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..methods.planner import cases
from ..methods.registry import build, presets, resolve
from .flops import Size, average_tokens, percent_visual_only, percent_with_text


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        name: name of the method.
        tokens: budget; None for a method without one.
        hyper: hyper-parameters and their defaults.
        presets: preset -> hyper-parameters.
        about: first line of the method's docstring.
        entering: visual tokens entering each layer; None if they depend on the data.
        leaving: visual tokens leaving each layer; None if they depend on the data.
        average_entering: mean of `entering`, which determines the work.
        average_leaving: mean of `leaving`, the convention of AutoPrune's and SparseVLM's tables.
        percent_visual_only: FLOPs by equation (2) on entering visual tokens, in percent of the unpruned model's.
        percent_with_text: the same with text tokens.
        note: assumptions of the counts, or the reason why there are none.
        positions, decode: see `Method`.
        paper, where, backends, batch, source, licence: see `MethodInfo`.
    """

    name: str
    tokens: int | None
    hyper: dict[str, Any]
    presets: dict[str, dict[str, Any]]
    about: str
    paper: str
    where: str
    entering: list[int] | None
    leaving: list[int] | None
    average_entering: float | None
    average_leaving: float | None
    percent_visual_only: float | None
    percent_with_text: float | None
    note: str
    positions: str
    decode: str
    backends: str
    batch: str
    source: str
    licence: str


def method_row(name: str, tokens: int | None, size: Size, text: float) -> Row:
    """Return the row of one method.

    Args:
        name: "name", "name:preset" or a composition.
        tokens: budget; None for a method without one, see `planner.cases`.
        size: the model.
        text: text tokens in `percent_with_text`.
    """
    cls, _ = resolve(name)
    found = inspect.signature(cls).parameters.values()
    entering: list[int] | None = None
    leaving: list[int] | None = None
    note = ""
    method: Any = cls
    try:
        method = build(name, **({} if tokens is None else {"tokens": tokens}))
        shown = method.example(size.visual, size.layers)
        if shown is None:
            note = "depends on the data"
        else:
            entering, leaving, note = shown
    except ValueError as error:
        note = str(error)
    return Row(
        name=name,
        tokens=tokens,
        hyper={p.name: None if p.default is p.empty else p.default for p in found},
        presets=presets(name),
        about=(inspect.getdoc(cls) or "").split("\n")[0],
        paper=method.info.paper,
        where=method.info.where,
        entering=entering,
        leaving=leaving,
        average_entering=None if entering is None else average_tokens(entering),
        average_leaving=None if leaving is None else average_tokens(leaving),
        percent_visual_only=None if entering is None else percent_visual_only(entering, size),
        percent_with_text=None if entering is None else percent_with_text(entering, text, size),
        note=note,
        positions=method.positions,
        decode=method.decode,
        backends=method.info.backends,
        batch=method.info.batch,
        source=method.info.source,
        licence=method.info.licence,
    )


def table(budgets: Sequence[int], size: Size, text: float, chosen: Sequence[str] = ("all",)) -> list[Row]:
    """Return the rows of the chosen methods at every budget; see `planner.cases`.

    Args:
        budgets: visual token budgets.
        size: the model.
        text: text tokens in `percent_with_text`.
        chosen: names, presets or compositions; "all" is every registered method.

    Raises:
        ValueError: for a budget outside 1..visual, or an unknown name.
    """
    for tokens in budgets:
        if not 1 <= tokens <= size.visual:
            raise ValueError(f"tokens={tokens} is outside 1..{size.visual}; give at most the visual tokens of an image")
    return [method_row(c.name, c.tokens, size, text) for c in cases(chosen, budgets)]


def runs(counts: Sequence[int]) -> str:
    """Return layer counts in run-length form: [576, 576, 30] becomes "2x576 30"."""
    out: list[tuple[int, int]] = []
    for n in counts:
        times = out.pop()[0] + 1 if out and out[-1][1] == n else 1
        out.append((times, n))
    return " ".join(f"{t}x{n}" if t > 1 else str(n) for t, n in out)
