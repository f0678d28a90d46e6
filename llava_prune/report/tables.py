"""The tables of the paper with measured values beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .published import Column, PublishedTable, Row, ratio
from .store import StoredRun

Runs = Mapping[str, StoredRun]
"""Benchmark -> the run that measures a row on it; those that were not run are absent."""


def published_table(table: PublishedTable) -> dict[str, Any]:
    """A published table alone: {"table", "columns", "baseline", "rows": [{"method", "avg_tokens", "scores", ...}]}.

    `ratio_recomputed` follows from the published scores; `ratio_published` is what the table prints.
    """
    return {
        "table": table.name,
        "title": table.title,
        "source": table.source,
        "model": table.model,
        "columns": [c.name for c in table.columns],
        "baseline": _published(table, table.baseline),
        "rows": [_published(table, row) for row in table.rows],
    }


def _published(table: PublishedTable, row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "venue": row.venue,
        "avg_tokens": row.avg_tokens,
        "scores": list(row.scores),
        "ratio_published": row.ratio,
        "ratio_recomputed": _rounded(ratio(row.scores, table.baseline.scores)),
        "flops_published": row.flops,
    }


def measured_table(table: PublishedTable, full: Runs, rows: Sequence[Runs]) -> dict[str, Any]:
    """A table as `published_table` gives it, every row with what was measured.

    Each row has `measured` (one value a column, None where it was not run), `intervals` (95 %, None where the figure is
    no mean over questions), `difference` to the published score, `ratio_measured`, `flops_measured` (percent; the mean
    over benchmarks), `tokens_measured` (visual tokens leaving a layer) and `runs`, the folder of each run.

    Args:
        table: what was published.
        full: runs of the unpruned model.
        rows: those of each row of the table, in its order.
    """
    out = published_table(table)
    base = [_value(column, full) for column in table.columns]
    for told, runs in zip([out["baseline"], *out["rows"]], [full, *rows], strict=True):
        values = [_value(column, runs) for column in table.columns]
        pairs = zip(values, told["scores"], strict=True)
        told |= {
            "measured": values,
            "intervals": [_interval(column, runs) for column in table.columns],
            "difference": [None if v is None else _rounded(v - p) for v, p in pairs],
            "ratio_measured": _rounded(ratio(values, base)),
            "flops_measured": _mean([r.flops_percent(table.counting or "with_text_entering") for r in runs.values()]),
            "tokens_measured": _mean([r.average_tokens() for r in runs.values()]),
            "runs": {task: str(run.folder) for task, run in runs.items()},
        }
    models = sorted({run.model for runs in (full, *rows) for run in runs.values()})
    return {**out, "measured_model": ", ".join(models) or None}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return _rounded(fmean(known)) if known else None


def _value(column: Column, runs: Runs) -> float | None:
    """What was measured for a column; None where a run is missing or has no figure."""
    found = [_look_up(runs.get(task), column) for task in column.tasks]
    known = [v for v in found if v is not None]
    return fmean(known) if len(known) == len(found) else None


def _look_up(run: StoredRun | None, column: Column) -> float | None:
    value: Any = None if run is None else run.result
    for part in column.figure.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return _scale(run, column) * value if isinstance(value, (int, float)) else None


def _scale(run: StoredRun | None, column: Column) -> float:
    return 100 / run.result["rows"] if run is not None and column.percent else 1.0


def _interval(column: Column, runs: Runs) -> list[float] | None:
    """95 % interval of a column; of the mean of several benchmarks from theirs, which are independent."""
    value, parts = _value(column, runs), []
    for run in map(runs.get, column.tasks):
        if value is None or run is None or run.figure is None or run.interval is None or column.figure != "figure":
            return None
        low, high = run.interval
        parts.append([_scale(run, column) * gap for gap in (run.figure - low, high - run.figure)])
    below, above = (math.hypot(*gaps) / len(parts) for gaps in zip(*parts, strict=True))
    return None if value is None else [value - below, value + above]
