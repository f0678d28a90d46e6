"""The table of `llava-prune methods`."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llava_prune
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
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f" {n} ") >= 3 for n in llava_prune.names())


def test_budgets_above_the_visual_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--tokens", "577"]) == 1
    assert "1..576" in capsys.readouterr().err
