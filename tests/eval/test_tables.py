"""`llava-prune table` from its command line to the printed cells, with a stand-in for the model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.arguments import TINY
from llava_prune.cli import main
from llava_prune.eval import command, tables
from llava_prune.eval.plan import Settings
from llava_prune.report.published import read_table


@pytest.fixture
def argv(nine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command for table 3 with budgets of 8 and 4 tokens, because the stand-in has 16 visual tokens."""
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
    """A command runs a part of the table; the other cells come from the store or stay empty."""
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


def test_what_limits_a_table(argv: list[str], stand_in: Any, capsys: Any) -> None:
    stand_in()
    assert main([*argv, "--task", "gqa,sqa", "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == {"gqa": 2, "sqa": 2} and found["releases"] == {"gqa": False, "sqa": False}
    assert found["limits"] == [
        "files of no published release: sqa, gqa", "the first 2 questions of each benchmark only"
    ]  # fmt: skip
    path = Path(found["rows"][0]["runs"]["gqa"]) / "result.json"
    edited = json.loads(path.read_text())
    edited["settings"] |= {"weights": "others"}
    edited["files"]["annotations"]["sha256"] = "others"
    path.write_text(json.dumps(edited))
    assert main([*argv, "--task", "gqa,sqa", "--limit", "2", "--no-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The runs are of several checkpoints" in said and "The runs of gqa are of different files" in said
    edited["settings"] |= {"questions": "others"}
    path.write_text(json.dumps(edited))
    assert main([*argv, "--task", "gqa,sqa", "--limit", "2", "--no-run"]) == 0
    assert "The runs of gqa are of different files" in " ".join(capsys.readouterr().out.split())


def test_a_single_benchmark_without_data(argv: list[str], stand_in: Any, tmp_path: Path, capsys: Any) -> None:
    stand_in()
    argv[5] = str(tmp_path)
    assert main([*argv, "--task", "gqa", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"][0]["measured"] == [None] * 5 and "gqa: no questions of gqa" in " ".join(err.split())


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


@pytest.mark.parametrize(
    ("given", "gpus", "model", "count"),
    [({}, 0, TINY, 5), ({"procs": 2}, 0, TINY, 2), ({}, 0, "a/b", 1), ({}, 1, TINY, 1), ({}, 4, TINY, 4),
     ({"device": "cpu"}, 0, TINY, 1), ({"many_runs": False}, 0, TINY, 1)],
)  # fmt: skip
def test_processes(given: dict[str, Any], gpus: int, model: str, count: int, monkeypatch: Any) -> None:
    """Without a GPU, the miniature model runs in one process for each core."""
    monkeypatch.setattr(command, "cores", lambda: 5)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    unset = dict.fromkeys(("gpus", "procs", "device", "device_map"))
    args = argparse.Namespace(**{**unset, "model": model, "many_runs": True, **given})
    assert command._processes(args, Settings(model=model)) == count


def test_settings_from_the_environment(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("METHOD", "autoprune")
    monkeypatch.setenv("TOKENS", "64")
    assert main(["table", "1", "--dry-run", "--json", "--store", str(tmp_path), "--task", "gqa"]) == 0
    assert [r["label"] for r in json.loads(capsys.readouterr().out)] == ["full", "autoprune-64"]
    monkeypatch.setenv("FLOPS", "49%")
    assert main(["eval", "gqa", "--dry-run"]) == 1
    assert "TOKENS and FLOPS are both given" in capsys.readouterr().err
    monkeypatch.delenv("TOKENS")
    assert main(["eval", "gqa", "--dry-run", "--json", "--store", str(tmp_path)]) == 0
    assert [r["label"] for r in json.loads(capsys.readouterr().out)] == ["full", "autoprune-294"]
