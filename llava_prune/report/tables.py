"""The tables of the paper with measured values beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .formats import Line, Sheet, number
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


# as text ----------------------------------------------------------------------------------------------------------

KINDS = {"measured": "measured", "scores": "published", "difference": "difference"}
"""Key of a row -> what its line is called."""
HEADINGS = {"MMB_CN": "MMB-CN", "MMB_cn_en": "MMB(cn,en)"}
"""Headings that differ from the names of columns."""
Cells = list[dict[str, Any]]


def sheet(table: Mapping[str, Any], intervals: bool = False) -> Sheet:
    """A table to be shown: a line a row, or three for what was measured, what was published and the difference.

    Args:
        table: see `measured_table` and `published_table`.
        intervals: add two lines for the limits of the 95 % intervals.
    """
    measured = "measured" in table["baseline"]
    ends = [end for end in ("ratio", "flops") if any(r[f"{end}_published"] is not None for r in table["rows"])]
    head = ["method", "tokens", *([""] if measured else []), *(HEADINGS.get(c, c) for c in table["columns"])]
    head += ["ratio", *([] if measured else ["ratio*"])] if "ratio" in ends else []
    head += ["FLOPs"] if "flops" in ends else []
    rows = [table["baseline"], *table["rows"]]
    draw = _measured_lines if measured else _published_lines
    budgets = [row["avg_tokens"] for row in rows]
    return Sheet(
        title=f"Table {table['table']}: {table['title']}",
        head=head,
        rows=[draw(row, [_digits(table, i) for i in range(len(table["columns"]))], ends, intervals) for row in rows],
        left=(0, 2) if measured else (0,),
        rules=[i for i in range(1, len(rows)) if budgets[i] != budgets[i - 1]],
        notes=_notes(table, ends, measured),
        cells=_cells(table, ends),
    )


def _digits(table: Mapping[str, Any], column: int) -> int:
    """Decimals of a column: none where all published scores are integers."""
    whole = all(isinstance(row["scores"][column], int) for row in (table["baseline"], *table["rows"]))
    return 0 if whole else 1


def _published_lines(row: Mapping[str, Any], digits: Sequence[int], ends: Sequence[str], _: bool) -> list[Line]:
    names = {"ratio": ("ratio_published", "ratio_recomputed"), "flops": ("flops_published",)}
    values = [number(row[name]) for end in ends for name in names[end]]
    return [[row["method"], _budget(row["avg_tokens"]), *map(number, row["scores"], digits), *values]]


def _budget(tokens: float | None) -> str:
    return number(tokens, 0)


def _measured_lines(row: Mapping[str, Any], digits: Sequence[int], ends: Sequence[str], intervals: bool) -> list[Line]:
    out = []
    tokens = row["tokens_measured"] if row["avg_tokens"] is None else row["avg_tokens"]
    for kind, name in KINDS.items():
        cells = [number(v, n, kind == "difference") for v, n in zip(row[kind], digits, strict=True)]
        head = [row["method"] if row["venue"] else "unpruned", _budget(tokens)] if kind == "measured" else ["", ""]
        out.append([*head, name, *cells, *(number(row.get(f"{end}_{name}")) for end in ends)])
    for at, name in enumerate(("95 % from", "95 % to") if intervals else ()):
        cells = ["" if v is None else number(v[at], n) for v, n in zip(row["intervals"], digits, strict=True)]
        out.append(["", "", name, *cells, *[""] * len(ends)])
    return out


def _notes(table: Mapping[str, Any], ends: Sequence[str], measured: bool) -> list[str]:
    out = [f"published: {table['source']}, {table['model']}"]
    if measured:
        out.append(f"measured: {table['measured_model'] or 'nothing yet'}")
        if table["measured_model"] and table["measured_model"] != table["model"]:
            out.append("the models differ, so the differences say nothing about the reproduction")
    if "ratio" in ends:
        text = "ratio: mean over the columns of the score in percent of the unpruned model's"
        out.append(text if measured else f"{text}; ratio*: the same, from the scores of this table")
    if "flops" in ends:
        out.append("FLOPs: percent of the unpruned model's, counted as docs/reproduction.md says")
    return out


def _cells(table: Mapping[str, Any], ends: Sequence[str]) -> Cells:
    """One object for each cell, with table, method, avg_tokens, column, published, measured, low, high, difference."""
    out = []
    for row in (table["baseline"], *table["rows"]):
        start = {"table": table["table"], "method": row["method"], "avg_tokens": row["avg_tokens"]}
        for i, column in enumerate(table["columns"]):
            cell = {**start, "column": column, "published": row["scores"][i]}
            if "measured" in row:
                low, high = row["intervals"][i] or (None, None)
                cell |= {"measured": row["measured"][i], "low": low, "high": high, "difference": row["difference"][i]}
            out.append(cell)
        for end in ends:
            cell = {**start, "column": end, "published": row[f"{end}_published"]}
            out.append(cell | ({"measured": row[f"{end}_measured"]} if "measured" in row else {}))
    return out
