"""The tables of the paper: published scores, measured scores and output formats."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from rich.console import Console

from llava_prune.cli import main
from llava_prune.eval.plan import Settings, plan_runs
from llava_prune.eval.tables import request_of
from llava_prune.eval.task import load_task
from llava_prune.methods.planner import cases_of, plan
from llava_prune.models.load import read_size
from llava_prune.ops.counts import Size
from llava_prune.report import formats
from llava_prune.report.published import PublishedTable, read_table, table_names
from llava_prune.report.store import StoredRun
from llava_prune.report.tables import measured_table, published_table, sheet

TABLES = table_names()
TOLERANCE = {"1": 0.1, "2": None, "3": 0.5, "4": 0.1, "next7b": 0.5}


def run(task: str, figure: float | None, interval: tuple[float, float] | None = None, **details: float) -> StoredRun:
    """Return a stored run with the fields that tables read."""
    counts = {name: {"percent_of_full": 40.0} for name in ("visual_only_entering", "with_text_entering")}
    result = {
        "bench": task, "figure": figure, "interval": interval, "rows": 200, "details": details, "flops": counts,
        "visual_tokens": {"average_leaving": 64.0}, "settings": {"model": "some/model"},
    }  # fmt: skip
    return StoredRun(Path("store") / task, result)


def measured(table: PublishedTable, share: float = 0.9) -> dict[str, Any]:
    """Return a table whose unpruned runs have the published scores, and whose other runs have `share` of them."""
    full = {}
    for column, score in zip(table.columns, table.baseline.scores, strict=True):
        for task in column.tasks:
            figure = 2 * score if column.percent else score
            full[task] = run(task, figure, (figure - 3, figure + 4), total=score)
    rows = {}
    for task, base in full.items():
        assert base.figure is not None
        rows[task] = run(task, share * base.figure, None, total=share * base.result["details"]["total"])
    return measured_table(table, full, [rows] * len(table.rows))


@pytest.mark.parametrize("name", TABLES)
def test_ratios_follow_from_the_scores(name: str) -> None:
    """By the rule of the paper, a ratio is the mean of the ratios of the scores to the unpruned model's."""
    table = published_table(read_table(name))
    base, limit = table["baseline"]["scores"], TOLERANCE[name]
    for row in table["rows"]:
        by_hand = 100 * sum(s / b for s, b in zip(row["scores"], base, strict=True)) / len(base)
        assert row["ratio_recomputed"] == pytest.approx(by_hand, abs=0.006)
        if limit is None:
            assert row["ratio_published"] is None
        else:
            assert row["ratio_recomputed"] == pytest.approx(row["ratio_published"], abs=limit), row["method"]


def test_some_published_cells() -> None:
    """The expected values were read from the paper by eye."""
    one, four = read_table("1"), read_table("4")
    assert len(one.rows) == 14 and len(four.rows) == 12 and len(read_table("3").rows) == 9
    assert one.rows[-1].method == "Ours" and one.rows[-1].scores == (57.7, 69.6, 57.1, 82.5, 1445, 63.6, 57.1)
    assert four.rows[8].scores == (70.3, 54.9, 55.6, 67.3, 1360) and four.rows[8].avg_tokens == 58
    assert [r.flops for r in read_table("3").rows] == [43.9, 42.9, 42.4, 35.1, 33.7, 33.2, 25.5, 23.2, 22.9]
    assert read_table("2").rows[0].scores == (69.6, 59.6, 85.9, 5.1)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_run(name: str) -> None:
    """The methods, budgets and benchmarks of every row exist, and its run can be planned on the miniature model."""
    table = read_table(name)
    assert all(load_task(task).name == task for task in table.tasks)
    assert all(len(row.scores) == len(table.columns) for row in (table.baseline, *table.rows))
    requests = [request_of(row) for row in table.rows]
    runs = plan_runs(Settings(requests=requests))
    assert len(runs) == len(table.rows) + 1 and runs[0].label == "full"
    for row, found in zip(table.rows, runs[1:], strict=True):
        assert "flops" in row.run or ":keep" in found.name or found.tokens == row.avg_tokens
        assert ":keep" not in found.name or found.method.hyper()["keep"] == row.avg_tokens


def test_half_of_the_flops_on_7b() -> None:
    """The budgets of table 2 are those that docs/reproduction.md states."""
    runs = plan(cases_of([request_of(row) for row in read_table("2").rows], size=Size()))
    assert [r.label for r in runs] == ["vtw-279", "topv-285", "autoprune-267"]
    assert runs[0].method.plan(576, 32) == [576] * 16 + [0] * 16


def test_markup_is_text() -> None:
    """Brackets in titles, cells and notes are printed, not taken for markup of the terminal."""
    shown = formats.Sheet("a [/b]", ["[red]x"], [[["[8,16]"]]], (0,), (), ["n [i]"], [])
    out = io.StringIO()
    Console(file=out, width=80).print(formats.text(shown))
    assert all(part in out.getvalue() for part in ("a [/b]", "[red]x", "[8,16]", "N [i]"))


def test_wide_tables_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """In a file or pipe a table is as wide as its content; in a terminal, cells are wrapped and not cut."""
    figure = "170.00 [125.0, 200.0]"
    shown = formats.Sheet("a", ["method", *"bcdefghi"], [[["autoprune", *[figure] * 8]]], (0,), (), ["n"], [])
    formats.show(shown, "text", False, None)
    out = capsys.readouterr().out
    assert out.count(figure) == 8 and "autoprune" in out and "…" not in out
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(formats.text(shown))
    assert narrow.getvalue().count("170.00") == 8 and "…" not in narrow.getvalue()


def test_misprinted_ratios_are_shown_twice() -> None:
    assert ["ratio*" in sheet(measured(read_table(n))).head for n in TABLES] == [False, False, True, False, True]
    row = sheet(measured(read_table("3"))).rows[6]
    assert [line[8] for line in row] == ["90.0", "96.6", "-6.6"] and [line[9] for line in row] == ["", "97.1", ""]


def test_size_is_read_from_the_config() -> None:
    assert (read_size(Settings.model).layers, read_size(Settings.model).visual) == (12, 576)


@pytest.mark.parametrize("name", TABLES)
def test_measured_values(name: str) -> None:
    found = measured(read_table(name))
    assert found["baseline"]["measured"] == pytest.approx(found["baseline"]["scores"])
    assert found["baseline"]["ratio_measured"] == 100 and found["measured_model"] == "some/model"
    for row in found["rows"]:
        expected = [0.9 * s for s in found["baseline"]["scores"]]
        assert row["measured"] == pytest.approx(expected) and row["ratio_measured"] == pytest.approx(90)
        gaps = [m - s for m, s in zip(expected, row["scores"], strict=True)]
        assert row["difference"] == pytest.approx(gaps, abs=0.006)
        assert row["flops_measured"] == 40 and row["tokens_measured"] == 64


def test_intervals() -> None:
    """The interval of a count is converted to percent; a mean of two benchmarks adds half-widths in quadrature."""
    base = measured(read_table("2"))["baseline"]
    sqa, both, pope, ocr = base["intervals"]
    assert sqa == pytest.approx([69.5 - 3, 69.5 + 4]) and pope == pytest.approx([85.9 - 3, 85.9 + 4])
    assert ocr == pytest.approx([31.3 - 1.5, 31.3 + 2])
    assert both == pytest.approx([61.5 - 3 / 2**0.5, 61.5 + 4 / 2**0.5])
    three = measured(read_table("3"))
    assert three["baseline"]["intervals"][0] is None, "the sum of MME is no mean over questions"
    assert three["rows"][0]["intervals"] == [None] * 5


def test_cells_that_were_not_run_are_empty() -> None:
    table = read_table("1")
    found = measured_table(table, {}, [{"gqa": run("gqa", 50.0)}, *[{}] * 13])
    assert found["rows"][0]["measured"] == [50.0, *[None] * 6] and found["rows"][0]["ratio_measured"] is None
    assert found["rows"][1]["measured"] == [None] * 7 and found["rows"][1]["tokens_measured"] is None
    lines = sheet(found).rows[1][0]
    assert lines == ["ToMe", "128", "measured", "50.0", *[""] * 7]
    assert sheet(found).rows[2][2] == ["", "", "difference", *[""] * 8]
    assert measured_table(table, {}, [{"gqa": run("gqa", None)}] * 14)["rows"][0]["measured"] == [None] * 7


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["published", "measured"])
def test_a_terminal_of_80_columns_is_enough(name: str, kind: str) -> None:
    table = published_table(read_table(name)) if kind == "published" else measured(read_table(name))
    for intervals in (False, True):
        out = io.StringIO()
        Console(file=out, width=80).print(formats.text(sheet(table, intervals)))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= 80 and "…" not in out.getvalue()
        assert sum(line.startswith(" Ours") for line in lines) == sum(
            r.method.startswith("Ours") for r in read_table(name).rows
        )


@pytest.mark.parametrize("name", TABLES)
def test_csv(name: str) -> None:
    table = measured(read_table(name))
    frame = pandas.read_csv(io.StringIO(formats.to_csv(sheet(table))))
    base, first = table["baseline"], table["rows"][0]
    assert list(frame.columns) == [
        "table", "method", "avg_tokens", "column", "published", "measured", "low", "high", "difference"
    ]  # fmt: skip
    scores = frame[frame["column"].isin(table["columns"])]
    assert len(scores) == len(table["columns"]) * (1 + len(table["rows"]))
    mine = scores[(scores.method == first["method"])].head(len(table["columns"]))
    assert mine.published.tolist() == first["scores"] and mine.measured.tolist() == pytest.approx(first["measured"])
    lows = [None if v is None else v[0] for v in base["intervals"]]
    assert [None if pandas.isna(v) else v for v in scores.head(len(lows)).low] == pytest.approx(lows)


def rows_of_latex(text: str) -> list[list[str]]:
    """Return the cells of the lines of a tabular, and check that LaTeX would accept it."""
    body = [x for x in text.splitlines() if not x.startswith("%")]
    assert re.fullmatch(r"\\begin\{tabular\}\{[lr]+\}", body[0]) and body[-1] == r"\end{tabular}"
    assert body[1] == r"\toprule" and body[-2] == r"\bottomrule" and body[3] == r"\midrule"
    width = len(body[0].removeprefix(r"\begin{tabular}{").removesuffix("}"))
    rows = [x.removesuffix(r" \\").split(" & ") for x in body[2:-2] if x != r"\midrule"]
    assert all(len(r) == width for r in rows) and all(x.endswith((r"\\", "rule")) for x in body[1:-1])
    special = re.compile(r"(?<!\\)[%#_&]")
    assert not any(special.search(cell) for row in rows for cell in row)
    return rows


@pytest.mark.parametrize("name", TABLES)
def test_latex(name: str) -> None:
    table = measured(read_table(name))
    shown = sheet(table, True)
    rows = rows_of_latex(formats.latex(shown))
    assert [c.replace("$-$", "-") for c in rows[1]] == shown.rows[0][0] and len(rows) == 1 + 5 * len(shown.rows)
    plain = rows_of_latex(formats.latex(sheet(published_table(read_table(name)))))
    assert plain[1][0] == table["baseline"]["method"] and len(plain) == 2 + len(table["rows"])


def test_latex_escapes() -> None:
    shown = formats.Sheet("100 %", ["a_b", "c&d"], [[["50%", r"x\y"]], [["-1.5", "{#}"]]], (0,), (1,), [], [])
    rows = rows_of_latex(formats.latex(shown))
    assert rows == [[r"a\_b", r"c\&d"], [r"50\%", r"x\textbackslash{}y"], ["$-$1.5", r"\{\#\}"]]


def test_latex_compiles(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex")
    body = "".join(formats.latex(sheet(measured(read_table(n)))) + "\n\n" for n in TABLES)
    text = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + body + "\\end{document}"
    (tmp_path / "t.tex").write_text(text)
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_markdown() -> None:
    table = measured(read_table("1"))
    lines = [x for x in formats.markdown(sheet(table)).splitlines() if x.startswith("|")]
    assert lines[1] == "|---" * 11 + "|" and len(lines) == 2 + 3 * 15
    assert [c.strip() for c in lines[2].strip("|").split("|")] == sheet(table).rows[0][0]
    assert formats.markdown_table(["a|b"], [["c"]]) == "| a\\|b |\n|---|\n| c |"


def test_published_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "1", "--published", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= {"table", "columns", "rows", "baseline"} and found["columns"][0] == "GQA"
    assert set(found["rows"][0]) >= {"method", "avg_tokens", "scores", "ratio_published", "ratio_recomputed"}
    for kind, start in (("markdown", "**Table 1"), ("latex", "% Table 1"), ("csv", "table,method"), ("text", " ")):
        assert main(["table", "1", "--published", "--format", kind]) == 0
        assert capsys.readouterr().out.startswith(start)


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, message in (
        (["5"], "unknown table '5'; known are 1, 2, 3, 4, next7b"),
        (["1", "--method", "vtw"], "table 1 has no such row; it has methods tome, "),
        (["1", "--tokens", "63"], "tokens 128, 64; benchmarks gqa, "),
        (["1", "--task", "gqa,vqav2"], "table 1 has no vqav2; it has"),
    ):
        assert main(["table", *argv, "--store", str(tmp_path)]) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_files_have_no_other_keys() -> None:
    """The files of published tables have known keys only, because a misspelt key would be ignored."""
    known = {"title", "source", "model", "flops", "columns", "baseline", "rows"}
    folder = Path(read_table.__code__.co_filename).parent / "published"
    for path in folder.glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        assert set(raw) <= known
        assert {k for c in raw["columns"].values() for k in c} <= {"task", "figure", "percent"}
        assert {k for r in raw["rows"] for k in r["run"]} <= {"method", "tokens", "flops"}
