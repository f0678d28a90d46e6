"""Where commands print (tables and JSON to stdout, everything else to stderr), and figures as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import what they need: --help stays quick
    from rich.console import Console
    from rich.table import Table


def stdout() -> Console:
    """A console for tables, wide enough in files and pipes too."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def stderr() -> Console:
    """A console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True)


def print_table(console: Console, table: Table, optional: Sequence[str] = ()) -> None:
    """Print a table that fits: the first column is not wrapped, and columns are left out where the terminal is narrow.

    Args:
        console: where.
        table: what.
        optional: headings of columns that may be left out, the first of them first. The caption names those that are.
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


def emit(value: Any) -> None:
    """Print JSON."""
    write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(text: str) -> None:
    """Print text on stdout as it is."""
    sys.stdout.write(text)


def number_text(value: float | None, digits: int = 1, sign: bool = False, absent: str = "-") -> str:
    """A number with so many decimals; `absent` for None."""
    return absent if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def figure_text(result: Mapping[str, Any]) -> str:
    """The figure of a result with its interval, as ``78.75 [74.5, 82.5]``."""
    interval = result["interval"]
    tail = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return number_text(result["figure"], 2) + tail


def difference_text(gap: Mapping[str, Any] | None) -> str:
    """A difference in points with its interval, as ``-2.50 [-5.6, +0.6]``; "-" where there is none."""
    if gap is None:
        return "-"
    return f"{gap['points']:+.2f}" + ("" if gap["low"] is None else f" [{gap['low']:+.1f}, {gap['high']:+.1f}]")
