"""All methods side by side: where they prune, what that leaves in each layer, and what it costs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..methods.registry import build, names, presets, resolve, takes_budget
from .flops import Size, average_tokens, percent_visual_only, percent_with_text


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        name: of the method.
        tokens: the budget, None for a method without one.
        hyper: hyper-parameters and defaults.
        presets: name -> hyper-parameters of its presets.
        about: first line of its docstring.
        paper: reference.
        where: the place it prunes.
        entering: visual tokens entering each layer, None where neither the budget nor an example says.
        leaving: visual tokens leaving each layer.
        average_entering: mean over layers, the work.
        average_leaving: mean over layers, the convention of AutoPrune's and SparseVLM's tables.
        percent_visual_only: equation (2) on the tokens entering, share of the unpruned model, visual tokens alone.
        percent_with_text: the same with text tokens.
        note: what the counts assume, or why there are none.
        positions: "keep" or "renumber" after a cut.
        decode: whose length gives a generated token its position.
        backends: attention implementations.
        batch: limits on batches and pictures.
        source: of the official code.
        licence: of that code.
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


def method_row(name: str, tokens: int, size: Size, text: float) -> Row:
    """The row of one method.

    Args:
        name: "name", "name:preset" or a composition.
        tokens: budget, ignored by methods without one and presets that state theirs.
        size: the model.
        text: text tokens in `percent_with_text`.
    """
    cls, own = resolve(name)
    found = inspect.signature(cls).parameters.values()
    budget: int | None = own.get("tokens", tokens) if takes_budget(cls, own) else None
    entering: list[int] | None = None
    leaving: list[int] | None = None
    note, method = "", cls
    try:
        method = build(name, **({} if budget is None else {"tokens": budget}))  # type: ignore[assignment]
        shown = method.example(size.visual, size.layers)  # type: ignore[call-arg, arg-type]
        if shown is None:
            note = "the data decide"
        else:
            entering, leaving, note = shown
    except ValueError as error:
        note = str(error)
    return Row(
        name=name,
        tokens=budget,
        hyper={p.name: None if p.default is p.empty else p.default for p in found},
        presets=presets(name),
        about=(inspect.getdoc(cls) or "").split("\n")[0],
        paper=cls.paper,
        where=method.where,
        entering=entering,
        leaving=leaving,
        average_entering=None if entering is None else average_tokens(entering),
        average_leaving=None if leaving is None else average_tokens(leaving),
        percent_visual_only=None if entering is None else percent_visual_only(entering, size),
        percent_with_text=None if entering is None else percent_with_text(entering, text, size),
        note=note,
        positions=method.positions,
        decode=method.decode,
        backends=method.backends,
        batch=method.batch,
        source=method.source,
        licence=method.licence,
    )


def table(budgets: Sequence[int], size: Size, text: float, chosen: Sequence[str] = ("all",)) -> list[Row]:
    """Methods at every budget; those without a budget, or with a preset that states it, once.

    Args:
        budgets: visual token budgets.
        size: the model.
        text: text tokens in `percent_with_text`.
        chosen: names, presets or compositions; "all" is every known method.

    Raises:
        ValueError: for a budget outside 1..visual, or an unknown name.
    """
    for tokens in budgets:
        if not 1 <= tokens <= size.visual:
            raise ValueError(f"tokens={tokens} is outside 1..{size.visual}, the model's visual tokens")
    rows = []
    for name in dict.fromkeys(n for c in chosen for n in (names() if c == "all" else [c])):
        cls, own = resolve(name)
        several = takes_budget(cls, own) and "tokens" not in own
        rows += [method_row(name, tokens, size, text) for tokens in (budgets if several else budgets[:1])]
    return rows


def runs(counts: Sequence[int]) -> str:
    """Counts of layers in short: [576, 576, 30] is "2x576 30"."""
    out: list[tuple[int, int]] = []
    for n in counts:
        times = out.pop()[0] + 1 if out and out[-1][1] == n else 1
        out.append((times, n))
    return " ".join(f"{t}x{n}" if t > 1 else str(n) for t, n in out)
