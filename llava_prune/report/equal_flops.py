"""Methods at equal FLOPs over several benchmarks: one row for each method, one column for each share of the FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing
from .formats import Sheet, number
from .sweeps import RATIO_NOTE, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOLERANCE = 2.0
"""Percentage points of FLOPs (visual tokens) by which a method may miss a budget; beyond, it has no cell in that
column.
"""
ROW = 0.145
"""Height of a method in the figure in inches."""
Table = Mapping[str, Any]


def levels(table: Table) -> list[float]:
    """Return the budgets in percent of the FLOPs, in order of appearance."""
    return list(dict.fromkeys(r["share"] for r in table["rows"] if r["share"] is not None))


def why_absent(row: Table) -> str | None:
    """Return why a method has no cell at a budget: it misses the budget or has no ratio; None if it has a cell."""
    spent = row["flops_visual"]
    if row["share"] is not None and (spent is None or abs(spent - row["share"]) > TOLERANCE):
        return "FLOPs unknown" if spent is None else f"spends {spent:.1f}%"
    if row["ratio"] is None or row["ratio"]["ratio"] is None:
        return str((row["ratio"] or {}).get("why") or "no ratio")
    return None


def _by_method(table: Table) -> dict[str, dict[float | None, Table]]:
    """Return method -> budget -> row; the key None stands for a method without a budget."""
    out: dict[str, dict[float | None, Table]] = {}
    for row in table["rows"]:
        out.setdefault(row["method"], {})[row["share"]] = row
    return out


def flops_sheet(table: Table) -> Sheet:
    """Return the table for display; its cells, for CSV, hold the figure of each benchmark.

    Args:
        table: table with ratios, see `sweeps.sweep_table`.
    """
    shares, rows, absent = levels(table), [], []
    for method, found in _by_method(table).items():
        line = [method]
        for share in shares:
            row = found.get(share)
            reason = "not run" if row is None else why_absent(row)
            line += ["", "", "", ""] if row is None or reason else _level(row)
            absent += [f"{method} at {share:g}% ({reason})"] if reason and None not in found else []
        rows += [[line]] if None not in found else []
    notes = [RATIO_NOTE, "FLOPs: percent of the unpruned prefill's, of the visual tokens and with the text"]
    if absent:
        notes.append(f"left out, without a ratio or over {TOLERANCE:g} points from the budget: {', '.join(absent)}")
    seeds = {r["method"]: max(s["seeds"] for s in r["scores"].values()) for r in table["rows"] if r["scores"]}
    notes += [f"{method}: mean of {count} seeds" for method, count in seeds.items() if count > 1]
    notes += [f"without a budget: {text}" for text in _floors(table)]
    head = [name for s in shares for name in (f"ratio at {s:g}%", "tokens", "FLOPs", "with text")]
    return Sheet(table["title"], ["method", *head], rows, (0,), (), notes, _cells(table))


def _level(row: Table) -> list[str]:
    """Return the cells of a method at a budget."""
    numbers = [number(row["tokens"], 0), number(row["flops_visual"]), number(row["flops"])]
    return [ratio_text(row["ratio"]), *numbers]


def _floors(table: Table) -> list[str]:
    """Return the methods without a budget, with their ratio, as text."""
    rows = [r for r in table["rows"] if r["share"] is None]
    return [f"{r['method']} {ratio_text(r['ratio']) or why_absent(r)}, FLOPs {number(r['flops'])}" for r in rows]


def _cells(table: Table) -> list[dict[str, Any]]:
    out = []
    for row in table["rows"]:
        start = {"method": row["method"], "budget": row["share"], "tokens": row["tokens"]}
        start |= {"flops_visual": row["flops_visual"], "flops": row["flops"], "left_out": why_absent(row)}
        ratio = row["ratio"] or {}
        out.append(
            {**start, "task": "ratio", "figure": ratio.get("ratio"), "low": ratio.get("low"), "high": ratio.get("high")}
        )
        for task, score in row["scores"].items():
            low, high = score.get("interval") or (None, None)
            out.append({**start, "task": task, "figure": score["figure"], "low": low, "high": high})
    return out


# figure ------------------------------------------------------------------------------------------------------------


@drawing.style()
def draw_equal_flops(table: Table) -> Figure:
    """Plot the ratio of each method with its interval, one panel for each budget.

    All panels show the methods in the same order, by their mean ratio over the budgets with the highest at the top;
    methods that lack a budget are at the bottom. A method has no point in a panel if `why_absent` names a reason.
    Methods without a budget are dotted lines.

    Args:
        table: table with ratios, see `sweeps.sweep_table`.

    Raises:
        ValueError: if there is no point to draw, or matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    shown = {
        m: {s: r for s, r in f.items() if s is not None and not why_absent(r)} for m, f in _by_method(table).items()
    }
    shown = {m: f for m, f in shown.items() if f}
    if not shown:
        raise ValueError("the figure needs a method with a ratio at its budget; run all benchmarks of the sweep first")
    order = sorted(shown, key=lambda m: (len(shown[m]), fmean(r["ratio"]["ratio"] for r in shown[m].values()), m))
    shares = levels(table)
    figure = Figure(figsize=(drawing.WIDTHS[min(3, len(shares))], 0.75 + ROW * len(order)), layout="constrained")
    grid = figure.subplots(1, len(shares), sharex=True, sharey=True, squeeze=False)[0]
    for axes, share in zip(grid, shares, strict=True):
        _panel(axes, [shown[m].get(share) for m in order])
        _lines(axes, [r for r in table["rows"] if r["share"] is None and not why_absent(r)])
        axes.set_title(f"{share:g} % of the FLOPs")
        axes.set_yticks(range(len(order)), order)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, len(order) - 0.3)
    grid[len(grid) // 2].set_xlabel("mean ratio to the unpruned model (%)")
    drawing.legend(figure)
    return figure


def _panel(axes: Axes, rows: Sequence[Table | None]) -> None:
    places = [i for i, row in enumerate(rows) if row is not None]
    found = [row["ratio"] for row in rows if row is not None]
    x = np.array([r["ratio"] for r in found], dtype=float)
    ends = np.array([[r["low"], r["high"]] for r in found], dtype=float).reshape(-1, 2)
    reach = np.maximum(0, [x - ends[:, 0], ends[:, 1] - x])
    axes.errorbar(x, places, xerr=reach, fmt="o", color=drawing.PALETTE[0], markersize=3.5, elinewidth=0.9, capsize=1.5)


def _lines(axes: Axes, rows: Sequence[Table]) -> None:
    axes.axvline(100, color=drawing.UNPRUNED_COLOUR, linewidth=0.8, zorder=0, label=drawing.UNPRUNED_LABEL)
    for row in rows:
        axes.axvline(row["ratio"]["ratio"], color="#777777", linestyle=":", zorder=0, label=row["method"])
