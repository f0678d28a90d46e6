"""The tables of the paper, with measured values beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..arguments import TINY
from .formats import Line, Sheet, number
from .published import Column, PublishedTable, Row, ratio
from .store import StoredRun

Runs = Mapping[str, StoredRun]
"""Benchmark -> the run that measures a row on it. Benchmarks that were not run are absent."""


def published_table(table: PublishedTable) -> dict[str, Any]:
    """Return a published table alone: {"table", "columns", "baseline", "rows": [{"method", "scores", ...}], ...}.

    `ratio_recomputed` follows from the published scores; `ratio_published` is the ratio as printed.
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
    """Return a table as in `published_table`, with measured values added to every row.

    Each row has `measured` (one value for each column, None if it was not run), `intervals` (95 %, None if there is
    none, as for a sum of figures) and `difference` (measured minus published score). It also has `ratio_measured`,
    `ratio_difference`, `flops_measured` and `flops_difference` (percent, mean over benchmarks), `tokens_measured`
    (visual tokens leaving a layer) and `runs` (benchmark -> folder). The table has `measured_model`, `questions`
    (benchmark -> number), `releases` (benchmark -> whether its files are of a known release), and `limits`, see
    `_limits`.

    Args:
        table: the published table.
        full: runs of the unpruned model.
        rows: runs of each row, in the order of the table.
    """
    out = published_table(table)
    base = [_value(column, full) for column in table.columns]
    for entry, runs in zip([out["baseline"], *out["rows"]], [full, *rows], strict=True):
        values = [_value(column, runs) for column in table.columns]
        pairs = zip(values, entry["scores"], strict=True)
        entry |= {
            "measured": values,
            "intervals": [_interval(column, runs) for column in table.columns],
            "difference": [None if v is None else _rounded(v - p) for v, p in pairs],
            "ratio_measured": _rounded(ratio(values, base)),
            "flops_measured": _mean([r.flops_percent(table.counting or "with_text_entering") for r in runs.values()]),
            "tokens_measured": _mean([r.average_tokens() for r in runs.values()]),
            "runs": {task: str(run.folder) for task, run in runs.items()},
        }
        for end in ("ratio", "flops"):
            entry[f"{end}_difference"] = _gap(entry[f"{end}_measured"], entry[f"{end}_published"])
    every = [run for runs in (full, *rows) for run in runs.values()]
    models = sorted({run.model for run in every})
    return {
        **out,
        "measured_model": ", ".join(models) or None,
        "questions": {run.bench: run.result["rows"] for run in every},
        "releases": {run.bench: _released(run) for run in every},
        "limits": _limits(every),
    }


def _gap(measured: float | None, published: float | None) -> float | None:
    return None if measured is None or published is None else _rounded(measured - published)


def _released(run: StoredRun) -> bool:
    """Return whether all files that a run was scored with are of a known release."""
    return all(facts.get("version") is not None for facts in run.result.get("files", {}).values())


def _limits(runs: Sequence[StoredRun]) -> list[str]:
    """Return the reasons why measured cells cannot be compared with the published ones, or with each other."""
    out = []
    unknown = [name for name in dict.fromkeys(r.bench for r in runs) if not all(map(_released, _of(runs, name)))]
    if unknown:
        out.append(f"files of no published release: {', '.join(unknown)}")
    limit = next((r.result["settings"].get("limit") for r in runs), None)
    if limit is not None:
        out.append(f"the first {limit} questions of each benchmark only")
    for name, text in (("weights", "checkpoints"), ("versions", "versions of packages")):
        if len({str(r.result["settings"].get(name)) for r in runs}) > 1:
            out.append(f"the runs are of several {text}")
    for name in dict.fromkeys(r.bench for r in runs):
        files = [(r.labels, *(r.result["settings"].get(k) for k in ("questions", "images"))) for r in _of(runs, name)]
        if len(set(map(str, files))) > 1:
            out.append(f"the runs of {name} are of different files")
    return out


def _of(runs: Sequence[StoredRun], bench: str) -> list[StoredRun]:
    return [r for r in runs if r.bench == bench]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return _rounded(fmean(known)) if known else None


def _value(column: Column, runs: Runs) -> float | None:
    """Return the measured value of a column; None if a run is missing or has no figure."""
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
    """Return the 95 % interval of a column.

    The interval of a mean of several benchmarks follows from their intervals, which are independent.
    """
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
"""Key of a row -> name of its line."""
HEADINGS = {"MMB_CN": "MMB-CN", "MMB_cn_en": "MMB(cn,en)"}
"""Headings that differ from the names of their columns."""
Cells = list[dict[str, Any]]


def sheet(table: Mapping[str, Any], intervals: bool = False) -> Sheet:
    """Return a table for display.

    A row has one line, or three with measured values: measured, published and difference.

    Args:
        table: table of `measured_table` or `published_table`.
        intervals: whether to add two lines for the limits of the 95 % intervals.
    """
    measured = "measured" in table["baseline"]
    ends = [end for end in ("ratio", "flops") if any(r[f"{end}_published"] is not None for r in table["rows"])]
    head = ["method", "tokens", *([""] if measured else []), *(HEADINGS.get(c, c) for c in table["columns"])]
    again = "ratio" in ends and (not measured or _misprinted(table))
    head += ["ratio", *(["ratio*"] if again else [])] if "ratio" in ends else []
    head += ["FLOPs"] if "flops" in ends else []
    rows = [table["baseline"], *table["rows"]]
    draw = _measured_lines if measured else _published_lines
    budgets = [row["avg_tokens"] for row in rows]
    ends = ["ratio", "ratio*", *ends[1:]] if again else ends
    return Sheet(
        title=f"Table {table['table']}: {table['title']}",
        head=head,
        rows=[draw(row, [_digits(table, i) for i in range(len(table["columns"]))], ends, intervals) for row in rows],
        left=(0, 2) if measured else (0,),
        rules=[i for i in range(1, len(rows)) if budgets[i] != budgets[i - 1]],
        notes=_notes(table, ends, measured),
        cells=_cells(table, ends),
    )


def _misprinted(table: Mapping[str, Any]) -> bool:
    """Return whether a printed ratio differs from the recomputed one by more than rounding."""
    gaps = [_gap(r["ratio_recomputed"], r["ratio_published"]) or 0.0 for r in table["rows"]]
    return max(map(abs, gaps)) > 0.1


def _digits(table: Mapping[str, Any], column: int) -> int:
    """Return the number of decimals of a column: 0 if all published scores are integers, else 1."""
    whole = all(isinstance(row["scores"][column], int) for row in (table["baseline"], *table["rows"]))
    return 0 if whole else 1


def _published_lines(row: Mapping[str, Any], digits: Sequence[int], ends: Sequence[str], _: bool) -> list[Line]:
    values = [_end(row, end, "published") for end in ends]
    return [[row["method"], _budget(row["avg_tokens"]), *map(number, row["scores"], digits), *values]]


def _end(row: Mapping[str, Any], end: str, kind: str) -> str:
    """Return a cell of a line after the scores."""
    if end == "ratio*":
        return number(row["ratio_recomputed"]) if kind == "published" else ""
    return number(row.get(f"{end}_{kind}"), 1, kind == "difference")


def _budget(tokens: float | None) -> str:
    return number(tokens, 0)


def _measured_lines(row: Mapping[str, Any], digits: Sequence[int], ends: Sequence[str], intervals: bool) -> list[Line]:
    out = []
    tokens = row["tokens_measured"] if row["avg_tokens"] is None else row["avg_tokens"]
    for kind, name in KINDS.items():
        cells = [number(v, n, kind == "difference") for v, n in zip(row[kind], digits, strict=True)]
        head = [row["method"] if row["venue"] else "unpruned", _budget(tokens)] if kind == "measured" else ["", ""]
        out.append([*head, name, *cells, *(_end(row, end, name) for end in ends)])
    for at, name in enumerate(("95 % from", "95 % to") if intervals else ()):
        cells = ["" if v is None else number(v[at], n) for v, n in zip(row["intervals"], digits, strict=True)]
        out.append(["", "", name, *cells, *[""] * len(ends)])
    return out


def _notes(table: Mapping[str, Any], ends: Sequence[str], measured: bool) -> list[str]:
    out = [f"published: {table['source']}, {table['model']}"]
    if measured:
        model = table["measured_model"]
        small = ", a miniature model, which says nothing about the published ones" if model == TINY else ""
        out += [f"measured: {model or 'nothing yet'}{small}", *table["limits"]]
    if "ratio" in ends:
        out.append("ratio: mean over the columns of the score in percent of the unpruned model's")
    if "ratio*" in ends:
        out.append("ratio*: the same, recomputed from the published scores")
    if "flops" in ends:
        out.append("FLOPs: percent of the unpruned model's, counted as docs/reproduction.md says")
    return out


def _cells(table: Mapping[str, Any], ends: Sequence[str]) -> Cells:
    """Return one dictionary for each cell of a table, for CSV.

    Its keys are table, method, avg_tokens, column, published and, with measured values, measured, low, high,
    difference.
    """
    out = []
    for row in (table["baseline"], *table["rows"]):
        start = {"table": table["table"], "method": row["method"], "avg_tokens": row["avg_tokens"]}
        for i, column in enumerate(table["columns"]):
            cell = {**start, "column": column, "published": row["scores"][i]}
            if "measured" in row:
                low, high = row["intervals"][i] or (None, None)
                cell |= {"measured": row["measured"][i], "low": low, "high": high, "difference": row["difference"][i]}
            out.append(cell)
        for end in (e for e in ends if e != "ratio*"):
            cell = {**start, "column": end, "published": row[f"{end}_published"]}
            more = (
                {"measured": row[f"{end}_measured"], "difference": row[f"{end}_difference"]}
                if "measured" in row
                else {}
            )
            out.append(cell | more)
    return out
