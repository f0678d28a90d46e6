"""The table of `llava-prune methods`."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

import llava_prune
from llava_prune import console
from llava_prune.bench import tables
from llava_prune.bench.flops import Size, percent_visual_only
from llava_prune.bench.methods import method_row, runs
from llava_prune.cli import main


def test_runs_shorten_equal_layers() -> None:
    assert runs([576, 576, 30, 30, 30, 7]) == "2x576 3x30 7"


def test_every_method_has_a_row_with_counts_cost_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--tokens", "128,64", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {r["name"] for r in rows} >= set(llava_prune.names())
    assert [r["tokens"] for r in rows if r["name"] == "random"] == [128, 64]
    for r in rows:
        assert r["where"] and r["source"] and r["licence"] and r["backends"] and r["batch"], r["name"]
        if r["entering"] is None:
            assert r["note"], r["name"]
            continue
        assert len(r["entering"]) == len(r["leaving"]) == 32
        assert r["entering"][1:] == r["leaving"][:-1]
        assert r["average_entering"] == sum(r["entering"]) / 32
        assert r["average_leaving"] == sum(r["leaving"]) / 32
        assert r["percent_visual_only"] == pytest.approx(percent_visual_only(r["entering"], Size()))
        assert r["percent_visual_only"] <= r["percent_with_text"] + 1e-9


def test_autoprune_shows_a_stated_example() -> None:
    row = method_row("autoprune", 64, Size(), 70)
    assert row.entering is not None and row.entering[:2] == [576, 160]
    assert row.average_leaving == pytest.approx(64, abs=0.5)
    assert row.note.startswith("slope 0.2")


def test_the_tables_name_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, count in (([], 1), (["--long"], 3)):
        assert main(["methods", *flags]) == 0
        out = capsys.readouterr().out
        assert all(out.count(f" {n} ") >= count for n in llava_prune.names())


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("flags", [[], ["--long"]])
def test_tables_fit_the_terminal(
    width: int, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name of a method is broken, and the short table shows all its columns."""
    monkeypatch.setattr(tables, "stdout", lambda: Console(width=width))
    assert main(["methods", "--tokens", "192,64", *flags]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert all(f" {n} " in out for n in llava_prune.names()) and "FLOPs %" in out
    if not flags:
        assert "not shown" not in out


def test_columns_are_left_out_in_their_order() -> None:
    table = Table("method", "a long heading", "another one", caption="about")
    table.add_row("autoprune", "1", "2")
    narrow = Console(width=32, file=io.StringIO())
    console.print_table(narrow, table, ("absent", "another one", "a long heading"))
    assert [column.header for column in table.columns] == ["method", "a long heading"]
    assert table.caption == "about; not shown in 32 columns: another one"


def test_budgets_above_the_visual_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--tokens", "577"]) == 1
    assert "1..576" in capsys.readouterr().err
