"""Printing of commands (tables and JSON to stdout, everything else to stderr), and benchmark figures as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # functions import what they need, so that --help is fast
    from rich.console import Console
    from rich.table import Table


def stdout() -> Console:
    """Return a console for tables, which is wide enough in files and pipes as well."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def stderr() -> Console:
    """Return a console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True)


def print_table(console: Console, table: Table, optional: Sequence[str] = ()) -> None:
    """Print a table, leaving out columns if the terminal is narrow; the first column is not wrapped.

    Args:
        console: the console to print on.
        table: the table.
        optional: headings of columns that may be left out, in this order. The caption names the columns left out.
    """
    from rich.measure import Measurement

    table.columns[0].no_wrap = True
    wide = console.options.update(max_width=10_000)
    left_out = []
    for name in optional:
        if Measurement.get(console, wide, table).maximum <= console.width:
            break
        headings = [column.header for column in table.columns]
        if name not in headings:
            continue
        table.columns.pop(headings.index(name))
        left_out.append(name)
    if left_out:
        note = f"not shown in {console.width} columns: {', '.join(left_out)}"
        table.caption = f"{table.caption}; {note}" if table.caption else note
    console.print(table)


def print_whole(console: Console, table: Table, optional: Sequence[str] = ()) -> None:
    """Print a table as `print_table` does in a terminal; in a file or pipe, it is as wide as its content."""
    from rich.measure import Measurement

    if not console.is_terminal:
        wide = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    print_table(console, table, optional)


def emit(value: Any) -> None:
    """Print JSON."""
    write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(text: str) -> None:
    """Print text on stdout unchanged."""
    sys.stdout.write(text)


def number_text(value: float | None, digits: int = 1, sign: bool = False, absent: str = "-") -> str:
    """Format a number with `digits` decimals; return `absent` for None."""
    return absent if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def figure_text(result: Mapping[str, Any]) -> str:
    """Format the figure of a result with its interval, as ``78.75 [74.5, 82.5]``."""
    interval = result["interval"]
    tail = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return number_text(result["figure"], 2) + tail


def difference_text(gap: Mapping[str, Any] | None) -> str:
    """Format a difference in points with its interval, as ``-2.50 [-5.6, +0.6]``; return "-" for None."""
    if gap is None:
        return "-"
    return f"{gap['points']:+.2f}" + ("" if gap["low"] is None else f" [{gap['low']:+.1f}, {gap['high']:+.1f}]")
