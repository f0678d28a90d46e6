"""A table of `tables` as text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

KINDS = {"measured": "measured", "scores": "published", "difference": "difference"}
"""Key of a row -> what its line is called."""
CELL = ("table", "method", "avg_tokens", "column", "published", "measured", "low", "high", "difference")
"""Columns of the CSV."""
NAMES = {"MMB_CN": "MMB-CN", "MMB_cn_en": "MMB(cn,en)"}
"""Headings that differ from the names of columns."""
_LATEX = {c: "\\" + c for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX["\\"] = r"\textbackslash{}"
Line = list[str]


def lines(table: Mapping[str, Any], intervals: bool = False) -> tuple[Line, list[list[Line]]]:
    """A table as text: heading, and the lines of each row (measured, published, difference, interval).

    Args:
        table: see `tables.measured_table` and `tables.published_table`.
        intervals: add the limits of the 95 % intervals.
    """
    ratios, flops = _columns(table)
    head = ["method", "tokens", *([""] if _measured(table) else []), *(NAMES.get(c, c) for c in table["columns"])]
    head += (["ratio"] if _measured(table) else ["ratio", "ratio*"]) if ratios else []
    head += ["FLOPs"] if flops else []
    digits = [_digits(table, i) for i in range(len(table["columns"]))]
    rows = [table["baseline"], *table["rows"]]
    return head, [list(_lines_of(row, digits, ratios, flops, _measured(table), intervals)) for row in rows]


def _measured(table: Mapping[str, Any]) -> bool:
    return "measured" in table["baseline"]


def _columns(table: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the published table has a column of ratios, and one of FLOPs."""
    rows = table["rows"]
    return any(r["ratio_published"] is not None for r in rows), any(r["flops_published"] is not None for r in rows)


def _digits(table: Mapping[str, Any], column: int) -> int:
    """Decimals of a column: none where all published scores are integers."""
    whole = all(isinstance(row["scores"][column], int) for row in (table["baseline"], *table["rows"]))
    return 0 if whole else 1


def _lines_of(
    row: Mapping[str, Any], digits: Sequence[int], ratios: bool, flops: bool, measured: bool, intervals: bool
) -> list[Line]:
    tokens = "" if row["avg_tokens"] is None else str(row["avg_tokens"])
    if not measured:
        ends = [_number(row["ratio_published"]), _number(row["ratio_recomputed"])] if ratios else []
        ends += [_number(row["flops_published"])] if flops else []
        return [[row["method"], tokens, *map(_number, row["scores"], digits), *ends]]
    out = []
    for kind, name in KINDS.items():
        cells = [_number(v, n, kind == "difference") for v, n in zip(row[kind], digits, strict=True)]
        ends = [_number(row.get(f"{end}_{name}")) for end, shown in (("ratio", ratios), ("flops", flops)) if shown]
        head = [row["method"], tokens] if kind == "measured" else ["", ""]
        out.append([*head, name, *cells, *ends])
    for at, name in enumerate(("95 % from", "95 % to") if intervals else ()):
        cells = ["" if v is None else _number(v[at], n) for v, n in zip(row["intervals"], digits, strict=True)]
        out.append(["", "", name, *cells, *[""] * (ratios + flops)])
    return out


def _number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def notes(table: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    ratios, flops = _columns(table)
    out = [f"published: {table['source']}, {table['model']}"]
    if _measured(table):
        out.append(f"measured: {table['measured_model'] or 'nothing yet'}")
        if table["measured_model"] and table["measured_model"] != table["model"]:
            out.append("the models differ, so the differences say nothing about the reproduction")
    if ratios:
        text = "ratio: mean over the columns of the score in percent of the unpruned model's"
        out.append(text if _measured(table) else f"{text}; ratio*: the same, from the scores of this table")
    if flops:
        out.append("FLOPs: percent of the unpruned model's, see docs/reproduction.md")
    return out


def text(table: Mapping[str, Any], intervals: bool = False) -> Table:
    """A table for the terminal, at most 80 columns wide for the tables of the paper."""
    from rich import box
    from rich.table import Table

    head, rows = lines(table, intervals)
    caption = ". ".join(note[0].upper() + note[1:] for note in notes(table)) + "."
    out = Table(
        title=f"Table {table['table']}: {table['title']}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=0,
        caption_justify="left",
    )
    for number, name in enumerate(head):
        left = number == 0 or (number == 2 and _measured(table))
        out.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        for line in row:
            out.add_row(*line, style="dim" if _measured(table) and line[2] != "measured" else "")
    return out


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[c.replace("|", "\\|") for c in row] for row in (head, *rows)]
    drawn = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([drawn[0], "|---" * len(head) + "|", *drawn[1:]])


def latex(table: Mapping[str, Any], intervals: bool = False) -> str:
    """A LaTeX tabular with the rules of package booktabs, one after each budget."""
    head, rows = lines(table, intervals)
    aligned = "".join("l" if n == 0 or (n == 2 and _measured(table)) else "r" for n in range(len(head)))
    out = [f"% {note}" for note in notes(table)]
    out += [rf"\begin{{tabular}}{{{aligned}}}", r"\toprule", _latex_line(head), r"\midrule"]
    before = rows[0][0][1]
    for row in rows:
        if row[0][1] != before:
            out.append(r"\midrule")
        before = row[0][1]
        out += map(_latex_line, row)
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", ""])


def _latex_line(cells: Sequence[str]) -> str:
    escaped = (re.sub(r"[\\&%$#_{}~^]", lambda m: _LATEX[m[0]], c) for c in cells)
    return " & ".join(re.sub(r"^-(?=\d)", "$-$", c) for c in escaped) + r" \\"


def cells(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One object for each cell: `CELL`. Ratio and FLOPs are columns, too."""
    out = []
    for row in (table["baseline"], *table["rows"]):
        start = {name: row.get(name, table.get(name)) for name in ("table", "method", "avg_tokens")}
        for i, column in enumerate(table["columns"]):
            cell = {**start, "column": column, "published": row["scores"][i]}
            if _measured(table):
                low, high = row["intervals"][i] or (None, None)
                cell |= {"measured": row["measured"][i], "low": low, "high": high, "difference": row["difference"][i]}
            out.append(cell)
        for name, shown in zip(("ratio", "flops"), _columns(table), strict=True):
            if shown:
                cell = {**start, "column": name, "published": row[f"{name}_published"]}
                out.append({**cell, "measured": row.get(f"{name}_measured")})
    return out


def _csv(table: Mapping[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, CELL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(table))
    return out.getvalue()


def render(table: Mapping[str, Any], kind: str, intervals: bool = False) -> str:
    """A table in one of the formats that are plain text: "markdown", "latex" or "csv"."""
    if kind == "csv":
        return _csv(table)
    if kind == "latex":
        return latex(table, intervals)
    head, rows = lines(table, intervals)
    drawn = markdown(head, [line for row in rows for line in row])
    return (
        f"**Table {table['table']}: {table['title']}**\n\n{drawn}\n\n"
        + "\n".join(f"- {n}" for n in notes(table))
        + "\n"
    )
