"""The runs of a sweep as a table: one row for each method, budget and combination of hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..console import difference_text, figure_text
from .formats import Sheet, number
from .store import StoredRun
from .together import text


@dataclass(frozen=True)
class Point:
    """A combination of a sweep.

    Attributes:
        method: name, with its preset.
        tokens: budget; None for a method without one.
        hyper: the hyper-parameters that the sweep sets, as far as the method has them.
        runs: benchmark -> its runs, one for each seed; benchmarks that were not run are absent.
    """

    method: str
    tokens: int | None
    hyper: dict[str, Any]
    runs: dict[str, list[StoredRun]]


def sweep_table(title: str, tasks: Sequence[str], points: Iterable[Point]) -> dict[str, Any]:
    """{"title", "tasks", "varied", "rows"}: what was measured for each point.

    A row has `method`, `tokens`, `hyper`, `scores` (benchmark -> figure, 95 % `interval` and `difference` to the
    unpruned model of a single run; of several seeds the mean, the standard deviation `sd` and their number), and means
    over its runs: `flops` (percent of the unpruned model's, with text) and `tokens_measured` (leaving a layer).

    Args:
        title: of the sweep.
        tasks: benchmarks.
        points: combinations, in order.
    """
    points = list(points)
    varied = list(dict.fromkeys(name for p in points for name in p.hyper))
    return {"title": title, "tasks": list(tasks), "varied": varied, "rows": [_row(p) for p in points]}


def _row(point: Point) -> dict[str, Any]:
    every = [run for runs in point.runs.values() for run in runs]
    flops = [f for f in (run.flops_percent() for run in every) if f is not None]
    return {
        "method": point.method,
        "tokens": point.tokens,
        "hyper": point.hyper,
        "scores": {task: _score(runs) for task, runs in point.runs.items() if runs},
        "flops": fmean(flops) if flops else None,
        "tokens_measured": fmean(run.average_tokens() for run in every) if every else None,
        "runs": [str(run.folder) for run in every],
    }


def _score(runs: Sequence[StoredRun]) -> dict[str, Any]:
    figures = [run.figure for run in runs if run.figure is not None]
    out: dict[str, Any] = {"figure": fmean(figures) if figures else None, "seeds": len(runs)}
    if len(figures) > 1:
        return {**out, "sd": stdev(figures)}
    return {**out, "interval": runs[0].interval, "difference": runs[0].result.get("difference_to_full")}


def sweep_sheet(table: Mapping[str, Any]) -> Sheet:
    """A sweep to be shown."""
    tasks, varied = table["tasks"], table["varied"]
    head = ["method", "tokens", *varied]
    for task in tasks:
        head += [task, "to full"] if len(tasks) == 1 else [task]
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
        rows.append([[*line, number(row["flops"])]])
    notes = [
        "95 % intervals, or the standard deviation over seeds",
        "FLOPs: percent of the unpruned model's, text counted",
    ]
    return Sheet(table["title"], [*head, "FLOPs"], rows, (0,), (), notes, cells)


def _shown(hyper: Mapping[str, Any], name: str) -> str:
    return text(hyper[name]) if name in hyper else ""


def _figure(score: Mapping[str, Any]) -> str:
    if score.get("sd") is not None:
        return f"{score['figure']:.2f} ± {score['sd']:.2f} ({score['seeds']} seeds)"
    return figure_text({"interval": None, "figure": None, **score})
