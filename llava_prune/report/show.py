"""Print a table of the paper in the format that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..console import emit, stdout
from .formats import render, text


def show_table(table: Mapping[str, Any], kind: str, as_json: bool, intervals: bool = False) -> None:
    """Print a table.

    Args:
        table: see `tables.measured_table` and `tables.published_table`.
        kind: one of `arguments.FORMATS`.
        as_json: print JSON instead.
        intervals: add the limits of the 95 % intervals.
    """
    if as_json:
        emit(table)
    elif kind == "text":
        stdout().print(text(table, intervals))
    else:
        stdout().print(render(table, kind, intervals), markup=False, highlight=False, soft_wrap=True, end="")
