"""`llava-prune table`: run the methods of a table of the paper, and print measured beside published values."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..methods.planner import REFERENCE, Request
from ..ops.counts import FlopsShare
from ..report import formats
from ..report.published import PublishedTable, Row, read_table
from ..report.tables import measured_table, sheet
from .command import evaluate_settings, settings_of
from .plan import Settings
from .stored import stored_runs


def table(args: argparse.Namespace) -> int:
    """Run `llava-prune table` and return its exit status.

    Raises:
        ValueError: for bad input, or benchmarks that failed.
    """
    published = read_table(args.table)
    rows = _chosen(published, args.method or [], args.tokens or [])
    tasks = [t for t in published.tasks if not args.task or t in args.task]
    strange = [t for t in args.task or [] if t not in published.tasks]
    if strange or not rows:
        raise ValueError(
            f"table {published.name} has no {', '.join(strange) or 'such row'}; it has {_contents(published)}"
        )
    several = f"{','.join(tasks)},"  # a list even of one benchmark, so that failures leave empty cells
    settings = settings_of(args, task=several, requests=[request_of(row) for row in rows])

    def show(results: Mapping[str, Any], failed: Mapping[str, str]) -> None:
        found = filled(published, settings)
        formats.show(sheet(found, args.intervals), args.format, args.json, found)

    if args.no_run:
        show({}, {})
        return 0
    return evaluate_settings(args, settings, show)


def _chosen(published: PublishedTable, methods: Sequence[str], tokens: Sequence[int]) -> list[Row]:
    """Return the rows of the given methods at the given budgets; an empty list of names or budgets selects all.

    The result is empty if the table lacks one of them.
    """
    known = {_method(r) for r in published.rows} | {r.run["method"] for r in published.rows}
    if not {*methods} <= known or not {*tokens} <= {r.avg_tokens for r in published.rows}:
        return []
    return [
        row
        for row in published.rows
        if (not methods or {_method(row), row.run["method"]} & {*methods}) and (not tokens or row.avg_tokens in tokens)
    ]


def _method(row: Row) -> str:
    """Return the name of a row's method without its preset."""
    return str(row.run["method"]).partition(":")[0]


def _contents(published: PublishedTable) -> str:
    """Describe the methods, budgets and benchmarks of a table for a message."""
    methods = dict.fromkeys(_method(row) for row in published.rows)
    budgets = dict.fromkeys(str(row.avg_tokens) for row in published.rows if row.avg_tokens is not None)
    parts = {"methods": methods, "tokens": budgets, "benchmarks": published.tasks}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in parts.items() if values)


def request_of(row: Row) -> Request:
    """Return the request that measures a row of a table."""
    # 1 is a placeholder for a method without a budget
    budget = FlopsShare(row.run["flops"]) if "flops" in row.run else row.run.get("tokens", 1)
    return Request([row.run["method"]], [budget])


def filled(published: PublishedTable, settings: Settings) -> dict[str, Any]:
    """Fill a table with all of its runs in the store, including those that `settings` do not ask for."""
    requests = [Request([REFERENCE], [1]), *map(request_of, published.rows)]
    full, *rows = (found[0][1] for found in stored_runs(settings, requests, published.tasks))
    return measured_table(published, full, rows)
