"""`slope_step` leaves few schedules, and its effect on kept tokens is measured."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

import llava_prune
from llava_prune.eval import rounding
from llava_prune.eval.asking import prepare
from llava_prune.eval.plan import Settings, plan_runs
from llava_prune.eval.rounding import Seen, overlap
from llava_prune.eval.run import read_files
from llava_prune.eval.task import load_task
from llava_prune.experimental import graphs
from llava_prune.methods.autoprune import schedule
from tests.experimental.tape import Recorder

COUNT = int(os.environ.get("QUESTIONS", "24"))
"""Number of questions; all 400 take minutes."""


def plans(step: float | None) -> set[Any]:
    """Return the schedules for 2,000 values from 0 to 3 bit of mutual information, at a budget of 64 of 576 tokens."""
    method = llava_prune.build("autoprune", tokens=64, slope_step=step)
    slopes = {method.slope(3 * i / 2000) for i in range(2000)}  # type: ignore[attr-defined]
    return {schedule(k, 64, 576, 32, method.midpoint(32)).leaving for k in slopes}  # type: ignore[attr-defined]


def test_rounding_leaves_few_schedules() -> None:
    """There are nine rounded slopes, 0, 0.05, ... 0.4, and about one exact slope for each mutual information."""
    exact, rounded = plans(None), plans(0.05)
    assert len(rounded) <= 9 < 100 < len(exact)
    assert rounded & exact, "a rounded schedule is one that the exact slope can have too"
    for leaving in rounded:
        assert sum(leaving) / 32 == pytest.approx(64, abs=1)


def test_it_is_off_by_default() -> None:
    for name in ("autoprune", "autoprune-flash"):
        method = llava_prune.build(name)
        assert method.slope_step is None and method.slope(0.123) == 0.4 - 0.2 * 0.123  # type: ignore[attr-defined]


def test_overlap_by_hand() -> None:
    a = Seen(kept={0: [frozenset({1, 2}), frozenset()], 1: [frozenset({3}), frozenset({1})]})
    b = Seen(kept={0: [frozenset({2, 3}), frozenset()], 1: [frozenset({3}), frozenset({2})]})
    assert overlap(a, b) == [pytest.approx((1 / 3 + 1) / 2), 0.5]


def test_the_command(tiny_path: Any, capsys: Any) -> None:
    """A tiny step changes nothing; a step of 1 makes every slope 0."""
    args = ["--model", str(tiny_path), "--limit", "4", "--batch", "4", "--tokens", "64", "--json"]
    assert rounding.main([*args, "--step", "1e-9"]) == 0
    (fine,) = json.loads(capsys.readouterr().out)["rows"]
    assert fine["overlap"] == {"mean": 1.0, "least": 1.0} and fine["same_answers"] == fine["same_schedule"] == 1.0
    assert fine["figure"]["exact"] == fine["figure"]["rounded"] and fine["schedules"]["exact"] >= 1
    assert rounding.main([*args, "--step", "1"]) == 0
    (coarse,) = json.loads(capsys.readouterr().out)["rows"]
    assert coarse["schedules"]["rounded"] == 1 and 0 < coarse["overlap"]["least"] <= coarse["overlap"]["mean"] <= 1


@pytest.mark.experimental
def test_text_step_keeps_the_same_tokens(tiny_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefills recorded with rounded text lengths keep the same tokens; see tests/experimental/tape.py."""
    tape = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: tape)
    settings = Settings(
        model=str(tiny_path), methods=("autoprune",), tokens=(64,), batch=1, limit=COUNT, reference=False,
        method_args={"slope_step": 0.05},
    )  # fmt: skip
    task, (run,) = load_task("gqa"), plan_runs(settings)
    bench = prepare(settings, task, read_files(task, settings), [run])
    with bench.loaded.remember_images([run.method]) as bench.images:
        plain = rounding.watch(bench, run)
        padded = rounding.watch(bench, run, graphs=True, text_step=16)
    lengths = {len(bench.files.questions[i].text) for i in plain.rows}
    assert len(lengths) > 4 and tape.replayed > COUNT
    assert tape.recorded <= 2 * (1 + len(set(plain.plans.values()))), "one or two text lengths"
    assert padded.plans == plain.plans and padded.kept == plain.kept
    assert [r["text"] for r in padded.rows.values()] == [r["text"] for r in plain.rows.values()]


def test_a_method_without_a_slope(capsys: Any) -> None:
    assert rounding.main(["--method", "random"]) == 1
    assert "slope_step" in capsys.readouterr().err
