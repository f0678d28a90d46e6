"""Print sheets of text as a terminal table, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..console import emit, number_text, print_whole, stdout

if TYPE_CHECKING:
    from rich.table import Table

_LATEX = {c: "\\" + c for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX["\\"] = r"\textbackslash{}"
Line = list[str]
number = functools.partial(number_text, absent="")
"""Format a number as in `number_text`; a missing one gives an empty cell."""


@dataclass(frozen=True)
class Sheet:
    """A table for display.

    Attributes:
        title: heading above the table.
        head: names of the columns.
        rows: the lines of each row; the first line of a row is highlighted.
        left: numbers of the columns that are aligned left; the others are aligned right.
        rules: numbers of the rows with a rule above them.
        notes: notes below the table.
        cells: the content as one dictionary for each line of the CSV file.
    """

    title: str
    head: Line
    rows: list[list[Line]]
    left: Collection[int]
    rules: Collection[int]
    notes: list[str]
    cells: list[dict[str, Any]]


def show(sheet: Sheet, kind: str, as_json: bool, value: Any) -> None:
    """Print a sheet on stdout.

    Args:
        sheet: the table.
        kind: one of `arguments.FORMATS`.
        as_json: whether to print `value` as JSON instead.
        value: the content as dictionaries and lists.
    """
    if as_json:
        emit(value)
    elif kind == "text":
        print_whole(stdout(), text(sheet))
    else:
        drawn = {"markdown": markdown, "latex": latex, "csv": to_csv}[kind](sheet)
        stdout().print(drawn, markup=False, highlight=False, soft_wrap=True, end="")


def text(sheet: Sheet) -> Table:
    """Return the terminal table, without vertical rules so that the tables of the paper fit into 80 columns.

    In a terminal that is too narrow, cells are wrapped and not cut.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = " ".join(note[0].upper() + note[1:] + "." for note in sheet.notes)
    out = Table(title=Text(sheet.title), caption=Text(caption), box=box.SIMPLE_HEAD, padding=0, caption_justify="left")
    for number, name in enumerate(sheet.head):
        out.add_column(Text(name), justify="left" if number in sheet.left else "right", overflow="fold")
    for row in sheet.rows:
        for line in row:
            out.add_row(*map(Text, line), style="" if line is row[0] else "dim")
    return out


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of a Markdown table."""
    cells = [[c.replace("|", "\\|") for c in row] for row in (head, *rows)]
    drawn = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([drawn[0], "|---" * len(head) + "|", *drawn[1:]])


def markdown(sheet: Sheet) -> str:
    """Return title, table and notes in Markdown."""
    drawn = markdown_table(sheet.head, [line for row in sheet.rows for line in row])
    return f"**{sheet.title}**\n\n{drawn}\n\n" + "".join(f"- {n}\n" for n in sheet.notes)


def latex(sheet: Sheet) -> str:
    """Return a LaTeX tabular with the rules of package booktabs; notes are comments."""
    aligned = "".join("l" if n in sheet.left else "r" for n in range(len(sheet.head)))
    out = [f"% {note}" for note in (sheet.title, *sheet.notes)]
    out += [rf"\begin{{tabular}}{{{aligned}}}", r"\toprule", _latex_line(sheet.head), r"\midrule"]
    for number, row in enumerate(sheet.rows):
        out += [r"\midrule"] * (number in sheet.rules)
        out += map(_latex_line, row)
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", ""])


def _latex_line(cells: Sequence[str]) -> str:
    escaped = (re.sub(r"[\\&%$#_{}~^]", lambda m: _LATEX[m[0]], c) for c in cells)
    return " & ".join(re.sub(r"^-(?=\d)", "$-$", c) for c in escaped) + r" \\"


def to_csv(sheet: Sheet) -> str:
    """Return the cells as CSV, one dictionary a line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for c in sheet.cells for k in c)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sheet.cells)
    return out.getvalue()
