"""`llava-prune table` from its command line to the printed cells, with a stand-in for the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval import tables
from llava_prune.report.published import read_table


@pytest.fixture
def argv(nine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Table 3 with budgets of 8 and 4 tokens, as the stand-in has 16."""
    table = read_table("3")
    small = [
        dataclasses.replace(row, avg_tokens=n, run={"method": name, "tokens": n})
        for row, name, n in zip(table.rows, ("random", "autoprune", "random"), (8, 8, 4), strict=False)
    ]
    monkeypatch.setattr(tables, "read_table", lambda name: dataclasses.replace(table, rows=tuple(small)))
    model = tmp_path / "some-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    store = str(tmp_path / "store")
    return ["table", "3", "--model", str(model), "--data", str(nine), "--store", store, "--batch", "2"]


def result(argv: list[str], task: str, label: str) -> Any:
    return json.loads((Path(argv[7]) / task / "some-model" / label / "result.json").read_text())


def test_a_table(argv: list[str], stand_in: Any, capsys: Any) -> None:
    model = stand_in()
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["table"] == "3" and found["columns"] == ["MME", "MMB", "SQA", "GQA", "TextVQA"]
    for row, label in ((found["baseline"], "full"), (found["rows"][1], "autoprune-8"), (found["rows"][2], "random-4")):
        assert row["measured"][3] == result(argv, "gqa", label)["figure"]
        assert row["measured"][0] == result(argv, "mme", label)["details"]["total"]
        assert row["intervals"][3] == pytest.approx(result(argv, "gqa", label)["interval"])
        assert row["difference"][3] == pytest.approx(row["measured"][3] - row["scores"][3], abs=0.006)
        flops = [result(argv, t, label)["flops"]["with_text_entering"]["percent_of_full"] for t in row["runs"]]
        assert row["flops_measured"] == pytest.approx(sum(flops) / 5, abs=0.006) and len(flops) == 5
    calls = len(model.calls)
    assert main([*argv, "--format", "csv"]) == 0 and capsys.readouterr().out.startswith("table,method")
    assert len(model.calls) == calls, "a finished run was repeated"


def test_parts_fill_the_table(argv: list[str], stand_in: Any, capsys: Any) -> None:
    """A part is run, the cells of the others come from the store or stay empty."""
    stand_in()
    assert main([*argv, "--task", "gqa", "--method", "random", "--tokens", "4", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert [sum(v is not None for v in r["measured"]) for r in one["rows"]] == [0, 0, 1]
    assert main([*argv, "--task", "textvqa,gqa", "--method", "autoprune", "--json"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert [sum(v is not None for v in r["measured"]) for r in two["rows"]] == [0, 2, 1]
    model = stand_in()
    assert main([*argv, "--no-run", "--json"]) == 0 and not model.calls
    assert json.loads(capsys.readouterr().out)["rows"] == two["rows"]
    assert two["rows"][2]["ratio_measured"] is None, "of a part of the columns"


def test_dry_run(argv: list[str], stand_in: Any, capsys: Any) -> None:
    model = stand_in()
    assert main([*argv, "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 5 * 4 and {r["label"] for r in rows} == {"full", "random-8", "autoprune-8", "random-4"}
    assert not model.calls


def test_a_benchmark_without_data_leaves_its_cells_empty(
    argv: list[str], stand_in: Any, tmp_path: Path, capsys: Any
) -> None:
    stand_in()
    for name in ("gqa", "sqa", "textvqa", "MME"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(Path(argv[5]) / name)
    argv[5] = str(tmp_path / "data")
    assert main([*argv, "--json"]) == 1
    out, err = capsys.readouterr()
    row = json.loads(out)["rows"][0]
    assert row["measured"][1] is None and None not in (row["measured"][0], *row["measured"][2:])
    assert "mmbench: no questions of mmbench, looked for" in " ".join(err.split())
