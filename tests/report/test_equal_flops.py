"""The comparison at equal FLOPs: its table and its figure on made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_prune.report import formats
from llava_prune.report.drawing import save
from llava_prune.report.equal_flops import draw_equal_flops, flops_sheet, why_absent


def row(method: str, share: float | None, ratio: float | None, visual: float | None, seeds: int = 1) -> dict[str, Any]:
    found = {"ratio": ratio, "low": ratio and ratio - 2, "high": ratio and ratio + 1, "why": None if ratio else "x"}
    return {
        "method": method, "share": share, "tokens": None if share is None else 64, "hyper": {}, "ratio": found,
        "scores": {"gqa": {"figure": 90.0, "seeds": seeds, "interval": (85.0, 94.0)}},
        "flops": None if visual is None else visual + 4, "flops_visual": visual,
    }  # fmt: skip


def table() -> dict[str, Any]:
    rows = [
        row("fastv", 50.0, 97.0, 50.0), row("fastv", 20.0, 80.0, 20.0),
        row("vtw", 50.0, 99.0, 50.0), row("vtw", 20.0, 70.0, 16.7),
        row("random", 50.0, 98.0, 51.9, 3), row("random", 20.0, 91.0, 20.1, 3),
        row("text-only", None, 40.0, 0.0),
    ]  # fmt: skip
    return {"title": "T", "tasks": ["gqa", "pope"], "varied": [], "rows": rows}


def test_reasons_to_leave_out() -> None:
    assert why_absent(row("m", 50.0, 90.0, 51.9)) is None and why_absent(row("m", None, 90.0, 0.0)) is None
    assert why_absent(row("m", 50.0, 90.0, 52.1)) == "spends 52.1%"
    assert why_absent(row("m", 50.0, 90.0, None)) == "FLOPs unknown"
    assert why_absent(row("m", 50.0, None, 50.0)) == "x"


def test_the_table() -> None:
    """The table has a row for each method with a budget, and a note names each omitted cell with its reason."""
    sheet = flops_sheet(table())
    lines = {r[0][0]: r[0][1:] for r in sheet.rows}
    assert list(lines) == ["fastv", "vtw", "random"]
    assert lines["fastv"] == ["97.0 [95.0, 98.0]", "64", "50.0", "54.0", "80.0 [78.0, 81.0]", "64", "20.0", "24.0"]
    assert lines["vtw"][4:] == ["", "", "", ""]
    notes = " ".join(sheet.notes)
    assert "points from the budget: vtw at 20% (spends 16.7%)" in notes and "random: mean of 3 seeds" in notes
    assert "without a budget: text-only 40.0 [38.0, 41.0], FLOPs 4.0" in notes
    assert all(len(r[0]) == len(sheet.head) for r in sheet.rows)
    cells = {(c["method"], c["budget"], c["task"]): c for c in sheet.cells}
    assert cells["vtw", 20.0, "ratio"]["left_out"] == "spends 16.7%" and cells["fastv", 50.0, "gqa"]["figure"] == 90
    for draw in (formats.markdown, formats.latex, formats.to_csv):
        assert "fastv" in draw(sheet)


def test_the_figure(tmp_path: Path) -> None:
    """The figure has a point for each cell, the best method at the top, and a line for a method without a budget."""
    pytest.importorskip("matplotlib")
    figure = draw_equal_flops(table())
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["vtw", "fastv", "random"]
    assert [a.get_title() for a in figure.axes] == ["50 % of the FLOPs", "20 % of the FLOPs"]
    (one,), (two,) = left.containers, right.containers
    assert one.lines[0].get_xydata().tolist() == [[99, 0], [97, 1], [98, 2]]
    assert two.lines[0].get_xydata().tolist() == [[80, 1], [91, 2]]
    ends = one.lines[2][0].get_segments()
    assert [part[:, 0].tolist() for part in ends] == [[97, 100], [95, 98], [96, 99]]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["unpruned", "text-only"]
    assert {line.get_xdata()[0] for line in left.lines if line.get_label() == "text-only"} == {40}
    pdf, png = save(figure, tmp_path / "f")
    assert pdf.read_bytes().startswith(b"%PDF") and png.stat().st_size < 150_000
    again = save(draw_equal_flops(table()), tmp_path / "g")
    assert again[0].read_bytes() == pdf.read_bytes()


def test_nothing_to_draw() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="needs a method with a ratio at its budget"):
        draw_equal_flops({**table(), "rows": [row("vtw", 20.0, 70.0, 16.7)]})
