"""The runs of a sweep as a table, with one row for each method, budget and combination of hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..console import difference_text, figure_text
from .formats import Sheet, number
from .store import StoredRun
from .together import text

RATIO_NOTE = (
    "ratio: mean over the benchmarks of the figure in percent of the unpruned model's, with the 95 % interval of a "
    "paired bootstrap of the questions"
)


@dataclass(frozen=True)
class Point:
    """One combination of a sweep.

    Attributes:
        method: name of the method, including its preset.
        tokens: budget; None for a method without one.
        hyper: the hyper-parameters that the sweep sets and the method has.
        runs: benchmark -> its runs, one for each seed; benchmarks that were not run are absent.
        share: budget in percent of the FLOPs of the visual tokens; None for a budget in tokens, and without a budget.
    """

    method: str
    tokens: int | None
    hyper: dict[str, Any]
    runs: dict[str, list[StoredRun]]
    share: float | None = None


def sweep_table(
    title: str, tasks: Sequence[str], points: Iterable[Point], ratios: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the measurements of each point: {"title", "tasks", "varied", "rows"}.

    A row has `method`, `tokens`, `hyper`, `share` (the budget in FLOPs), `ratio` (from `ratios`), `runs` (folders), and
    `scores`: benchmark -> `figure`, 95 % `interval` and `difference` to the unpruned model for a single run, or mean
    `figure`, standard deviation `sd` and number of `seeds` for several. It also has means over its runs: `flops` and
    `flops_visual` (percent of the unpruned model's, with and without text) and `tokens_measured` (leaving a layer).

    Args:
        title: title of the sweep.
        tasks: benchmarks.
        points: combinations, in order.
        ratios: for each point `ratio`, `low`, `high` (mean over benchmarks in percent of the unpruned model's figure,
            with its bootstrap interval) and `why` if there is no ratio; None for a sweep of one benchmark.
    """
    points = list(points)
    varied = list(dict.fromkeys(name for p in points for name in p.hyper))
    rows = [_row(p) | {"ratio": ratios[i] if ratios else None} for i, p in enumerate(points)]
    return {"title": title, "tasks": list(tasks), "varied": varied, "rows": rows}


def _row(point: Point) -> dict[str, Any]:
    every = [run for runs in point.runs.values() for run in runs]
    return {
        "method": point.method,
        "tokens": point.tokens,
        "share": point.share,
        "hyper": point.hyper,
        "scores": {task: _score(runs) for task, runs in point.runs.items() if runs},
        "flops": _mean([run.flops_percent() for run in every]),
        "flops_visual": _mean([run.flops_percent("visual_only_entering") for run in every]),
        "tokens_measured": fmean(run.average_tokens() for run in every) if every else None,
        "runs": [str(run.folder) for run in every],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def _score(runs: Sequence[StoredRun]) -> dict[str, Any]:
    figures = [run.figure for run in runs if run.figure is not None]
    out: dict[str, Any] = {"figure": fmean(figures) if figures else None, "seeds": len(runs)}
    if len(figures) > 1:
        return {**out, "sd": stdev(figures)}
    return {**out, "interval": runs[0].interval, "difference": runs[0].result.get("difference_to_full")}


def sweep_sheet(table: Mapping[str, Any]) -> Sheet:
    """Return the table of a sweep for display."""
    tasks, varied = table["tasks"], table["varied"]
    head = ["method", "tokens", *varied]
    for task in tasks:
        head += [task, "vs full"] if len(tasks) == 1 else [task]
    head += ["ratio"] if len(tasks) > 1 else []
    rows, cells = [], []
    for row in table["rows"]:
        line = [row["method"], number(row["tokens"], 0), *(_shown(row["hyper"], name) for name in varied)]
        start = {"method": row["method"], "tokens": row["tokens"], **{n: row["hyper"].get(n) for n in varied}}
        for task in tasks:
            score = row["scores"].get(task, {})
            line.append(_figure(score))
            line += [difference_text(score.get("difference"))] if len(tasks) == 1 else []
            low, high = score.get("interval") or (None, None)
            shown = {"figure": score.get("figure"), "low": low, "high": high, "sd": score.get("sd")}
            cells.append({**start, "task": task, **shown, "seeds": score.get("seeds", 0), "flops": row["flops"]})
        line += [ratio_text(row["ratio"])] if len(tasks) > 1 else []
        rows.append([[*line, number(row["flops"])]])
    notes = [
        "95 % intervals, or the standard deviation over seeds",
        "FLOPs: percent of the unpruned model's, text counted",
        *([RATIO_NOTE] if len(tasks) > 1 else []),
        *dict.fromkeys(f"no ratio of {r['method']}: {r['ratio']['why']}" for r in table["rows"] if _why(r)),
    ]
    return Sheet(table["title"], [*head, "FLOPs"], rows, (0,), (), notes, cells)


def _why(row: Mapping[str, Any]) -> str | None:
    """Return why a row has no ratio; None if it has one or ratios were not computed."""
    found: str | None = (row["ratio"] or {}).get("why")
    return found


def ratio_text(found: Mapping[str, Any] | None) -> str:
    """Format a mean ratio with its interval; "" if there is no ratio."""
    if found is None or found["ratio"] is None:
        return ""
    ends = "" if found["low"] is None else f" [{found['low']:.1f}, {found['high']:.1f}]"
    return f"{found['ratio']:.1f}{ends}"


def _shown(hyper: Mapping[str, Any], name: str) -> str:
    return text(hyper[name]) if name in hyper else ""


def _figure(score: Mapping[str, Any]) -> str:
    if score.get("sd") is not None:
        return f"{score['figure']:.2f} ± {score['sd']:.2f} ({score['seeds']} seeds)"
    return figure_text({"interval": None, "figure": None, **score})
