"""--dry-run lists the runs and their unanswered questions without loading a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval import run
from llava_prune.eval.answers import ANSWERS, TIMING
from llava_prune.eval.forecast import forecast
from llava_prune.eval.plan import Settings


def settings(nine: Path, out: Path, **more: Any) -> Settings:
    return Settings(**{"model": "a/b", "data": str(nine), "out": str(out), "tokens": (4,), "batch": 2, **more})


def test_nothing_is_answered(nine: Path, tmp_path: Path) -> None:
    rows, failed = forecast(settings(nine, tmp_path, task="gqa,pope"), 8)
    assert not failed and [(r["bench"], r["label"], r["answered"], r["left"]) for r in rows] == [
        ("gqa", "full", 0, 4), ("gqa", "autoprune-4", 0, 4), ("pope", "full", 0, 12), ("pope", "autoprune-4", 0, 12),
    ]  # fmt: skip
    assert all(r["rate"] is None and r["seconds"] is None for r in rows) and not any(tmp_path.iterdir())
    rows, _ = forecast(settings(nine, tmp_path, task="gqa,pope"), 8, rate=0.5)
    assert [r["seconds"] for r in rows] == [1, 1, 3, 3]


def test_an_interrupted_run(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in({4: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(settings(nine, tmp_path))
    journal = tmp_path / "autoprune-4" / "answers.partial.jsonl"
    timed = [json.loads(x) for x in journal.read_bytes().splitlines()]
    for row in timed:
        row.update(seconds=0.2, tower_seconds=0.05, image_seconds=0.0)
    journal.write_text("".join(json.dumps(r) + "\n" for r in timed) + '{"row": 3')
    full, pruned = forecast(settings(nine, tmp_path), 2)[0]
    assert (full["answered"], full["left"], full["seconds"]) == (4, 0, 0.0)
    assert (pruned["answered"], pruned["left"]) == (2, 2)
    assert pruned["rate"] == pytest.approx(4) and pruned["seconds"] == pytest.approx(0.25)


def test_a_finished_run(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in()
    run.evaluate(settings(nine, tmp_path))
    lines = (tmp_path / "full" / TIMING).read_text().splitlines()
    assert len(lines) == len((tmp_path / "full" / ANSWERS).read_text().splitlines()) == 4
    assert all(
        r["answered"] == 4 and r["rate"] > 0 and r["note"] is None for r in forecast(settings(nine, tmp_path), 1)[0]
    )
    other = forecast(settings(nine, tmp_path, seed=3), 1)[0]
    assert all(r["answered"] == 0 and "refused" in r["note"] and "seed=0, now it is 3" in r["note"] for r in other)
    again = forecast(settings(nine, tmp_path, seed=3, restart=True), 1)[0]
    assert all(r["left"] == 4 and r["note"] is None for r in again)


def test_the_command(nine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "gqa", f"--data={nine}", f"--out={tmp_path}", "--tokens=4", "--dry-run"]
    assert main([*argv, "--gpus=8", "--rate=2", "--json"]) == 0
    assert [r["seconds"] for r in json.loads(capsys.readouterr().out)] == [0.25, 0.25]
    assert main(argv) == 0
    assert "autoprune-4" in capsys.readouterr().out
    assert main(["eval", "gqa", f"--data={tmp_path}", "--dry-run"]) == 1
    assert "gqa: " in capsys.readouterr().err
    assert main(["eval", "gqa", "--rate=2"]) == 1
    assert "--rate 2 needs --dry-run" in capsys.readouterr().err
