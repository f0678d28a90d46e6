"""The simulation of many processes on small hand-computed cases; scripts/scale/check.sh compares it with real runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llava_prune.eval import scale
from llava_prune.eval.answers import STAGES, TIMING
from llava_prune.eval.scale import PAPER, QUESTIONS, Cluster, makespan


def seconds(pieces: list[float], speeds: list[float], **more: float) -> float:
    return makespan([pieces], Cluster(speeds, **more), random.Random(0))


def test_without_failures() -> None:
    assert seconds([3.0, 2, 1], [1]) == 6
    assert seconds([1.0] * 8, [1, 1]) == 4 and seconds([1.0] * 8, [1, 1], start=5, between=2) == 11
    assert seconds([4.0, 1, 1, 1, 1], [1, 1]) == 5, "claimed ahead: the second of the first process waits for it"
    assert seconds([1.0, 1, 1, 10], [1, 1]) == 11
    assert seconds([1.0] * 6, [1, 0.5]) == 4, "a slow process gets less"
    assert makespan([[1.0, 1], [3.0]], Cluster([1, 1], between=1), random.Random(0)) == 1 + 1 + 1 + 3
    assert seconds([], [1, 1]) == 0


def test_never_less_than_the_work() -> None:
    draw = random.Random(1)
    for _ in range(50):
        pieces = [draw.uniform(0.1, 3) for _ in range(draw.randint(1, 60))]
        speeds = [draw.uniform(0.5, 1) for _ in range(draw.randint(1, 9))]
        found = seconds(pieces, speeds)
        assert max(pieces) / max(speeds) <= found + 1e-9 and sum(pieces) / sum(speeds) <= found + 1e-9
        assert found <= sum(pieces) / min(speeds) + 1e-9


def test_failures() -> None:
    """After a failure, the pieces that were begun or claimed remain, and all processes start again."""
    assert scale._work([1.0, 1, 1, 1, 1], [1, 1], 1.5) == (1.5, [1.0, 1, 1])
    assert scale._work([1.0, 1], [1, 1], 1.5) == (1.0, [])
    quiet = seconds([1.0] * 400, [1] * 4, start=10)
    assert quiet == 110
    often = [makespan([[1.0] * 400], Cluster([1] * 4, 10, 0, 20), random.Random(i)) for i in range(200)]
    mean = sum(often) / len(often)  # about 100 s x 80 / 3600 = 2.2 failures of 10 s and half of two pieces each
    assert 128 < mean < 142 and min(often) >= quiet


def test_times_of_a_real_run(tmp_path: Path) -> None:
    for label, factor in (("full", 2), ("autoprune-64", 1)):
        path = tmp_path / "gqa" / label / TIMING
        path.parent.mkdir(parents=True)
        rows = [{"piece": i // 2, **dict.fromkeys(STAGES.values(), factor * (1 + i % 2))} for i in range(4)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert scale.measured(tmp_path) == [[3 * 3 * 3, 3 * 3 * 3]]
    assert sorted(scale.spread(tmp_path)) == pytest.approx([2 / 3] * 4 + [4 / 3] * 4)
    with pytest.raises(ValueError, match="no timing.jsonl below it"):
        scale.measured(tmp_path / "gqa" / "none")


def test_the_paper() -> None:
    answers = {n: sum(QUESTIONS[t][0] for t in table.tasks) * len(table.budgets) for n, table in PAPER.items()}
    assert answers[4] == 13 * (107394 + 12578 + 5000 + 8910 + 2374) and len(PAPER[1].budgets) == 15
    one = scale.predict([1.0], {"7b": 10, "13b": 5}, 1.0, Cluster(()), [1, 8], 1.0)["rows"]
    for row in one:  # pruning shortens nothing and there is no overhead: answers over rate
        assert row["hours"]["1"] == pytest.approx(row["answers"] / (10 if row["model"] == "7b" else 5) / 3600)
        assert row["hours"]["1"] / 8 <= row["hours"]["8"] < row["hours"]["1"] / 6
    half = scale.predict([1.0], {"7b": 10, "13b": 5}, 1.0, Cluster(()), [8], 0.5)["rows"]
    assert all(b["hours"]["8"] >= a["hours"]["8"] for a, b in zip(one, half, strict=True))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["tables", str(tmp_path), "--rate-7b=10", "--rate-13b=5"]) == 1
    assert "timing.jsonl" in capsys.readouterr().err
    assert scale.main(["check", "nosuch", "--repeats=1"]) == 1
    assert "unknown benchmark" in capsys.readouterr().err
