"""The published tables: read published/<name>.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Column:
    """A column of scores.

    Attributes:
        name: heading, as published.
        tasks: the benchmark, or several benchmarks, whose mean the column shows.
        figure: dotted path into a result: "figure" (the headline figure) or one of its details.
        percent: whether the figure is a number of questions, which is shown in percent.
    """

    name: str
    tasks: tuple[str, ...]
    figure: str = "figure"
    percent: bool = False


@dataclass(frozen=True)
class Row:
    """A published row.

    Attributes:
        method: name of the method, as published.
        venue: where the method was published, according to the table; "" for the unpruned model.
        avg_tokens: average number of visual tokens; None if the table states FLOPs instead.
        run: the run that measures the row: "method", and "tokens" or "flops" (percent) unless a preset fixes the
            counts; empty for the unpruned model.
        scores: one score for each column.
        ratio: published average of the ratios to the unpruned model, in percent; None if the table has none.
        flops: published FLOPs in percent of the unpruned model's; None if the table has none.
    """

    method: str
    venue: str
    avg_tokens: int | None
    run: dict[str, Any]
    scores: tuple[float, ...]
    ratio: float | None
    flops: float | None


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper.

    Attributes:
        name: "1" to "4", or "next7b".
        title: title of the table.
        source: where the table is published.
        model: hub id of the checkpoint.
        columns: columns of scores.
        baseline: row of the unpruned model.
        rows: rows of the pruned models.
        counting: way of counting FLOPs, see `StoredRun.flops_percent`; None for a table without FLOPs.
    """

    name: str
    title: str
    source: str
    model: str
    columns: tuple[Column, ...]
    baseline: Row
    rows: tuple[Row, ...]
    counting: str | None

    @property
    def tasks(self) -> list[str]:
        """Names of the benchmarks, in the order of the columns."""
        return list(dict.fromkeys(task for column in self.columns for task in column.tasks))


def table_names() -> list[str]:
    """Return the names of the published tables."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def read_table(name: str) -> PublishedTable:
    """Read a published table.

    Raises:
        ValueError: for an unknown name.
    """
    import yaml

    if name not in table_names():
        raise ValueError(f"unknown table {name!r}; known are {', '.join(table_names())}")
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return PublishedTable(
        name=name,
        title=raw["title"],
        source=raw["source"],
        model=raw["model"],
        columns=tuple(_column(key, value) for key, value in raw["columns"].items()),
        baseline=_row({"venue": "", "run": {}, **raw["baseline"]}),
        rows=tuple(_row(r) for r in raw["rows"]),
        counting=raw.get("flops"),
    )


def _column(name: str, raw: dict[str, Any]) -> Column:
    tasks = [raw["task"]] if isinstance(raw["task"], str) else raw["task"]
    return Column(name, tuple(tasks), raw.get("figure", "figure"), raw.get("percent", False))


def _row(raw: dict[str, Any]) -> Row:
    return Row(**{**raw, "scores": tuple(raw["scores"])})


def ratio(scores: Sequence[float | None], full: Sequence[float | None]) -> float | None:
    """Return the mean over benchmarks of the score in percent of the unpruned model's, as in the paper's Ratio column.

    Args:
        scores: one score for each benchmark.
        full: scores of the unpruned model.

    Returns:
        The mean; None if a score is missing, or a score of the unpruned model is 0.
    """
    pairs = [(s, f) for s, f in zip(scores, full, strict=True) if s is not None and f]
    return 100 * sum(s / f for s, f in pairs) / len(pairs) if len(pairs) == len(scores) else None
