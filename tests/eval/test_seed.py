"""The seed of an evaluation reaches the methods that draw, and is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.eval import rounding, run
from llava_prune.eval.answers import ANSWERS, SETTINGS
from llava_prune.eval.asking import prepare
from llava_prune.eval.plan import Settings, plan_runs
from llava_prune.eval.task import load_task
from llava_prune.parsers import make_parser
from tests.eval.kill import DATA, checkpoint

LIMIT = 6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: Any) -> Any:
    return checkpoint(tmp_path_factory.mktemp("seed") / "model")


def settings(loaded: Any, out: Path, seed: int) -> Settings:
    return Settings(
        model=loaded.path, data=DATA, out=str(out), limit=LIMIT, batch=3, methods=("random",), tokens=(4,), seed=seed,
        max_new_tokens=4, reference=False,
    )  # fmt: skip


def kept(loaded: Any, out: Path, seed: int) -> dict[int, Any]:
    """Return the kept visual tokens of every layer, by question."""
    given = settings(loaded, out, seed)
    task, (planned,) = load_task("gqa"), plan_runs(given)
    bench = prepare(given, task, run.read_files(task, given), [planned], loaded)
    return rounding.watch(bench, planned).kept


def test_two_seeds_keep_different_tokens(loaded: Any, tmp_path: Path) -> None:
    zero, again, one = (kept(loaded, tmp_path, seed) for seed in (0, 0, 1))
    assert zero == again and zero.keys() == one.keys()
    assert all(zero[i][0] != one[i][0] and len(zero[i][0]) == len(one[i][0]) == 4 for i in zero)


def test_two_seeds_give_different_answers(loaded: Any, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run.evaluate(settings(loaded, tmp_path / name, seed), loaded=loaded)
        folder = tmp_path / name / "random-4"
        stored = json.loads((folder / SETTINGS).read_text())
        assert stored["seed"] == seed and stored["hyper"]["seed"] == seed
        texts.append([json.loads(line)["text"] for line in (folder / ANSWERS).read_text().splitlines()])
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == LIMIT


def test_the_environment_sets_the_seed() -> None:
    assert make_parser({"SEED": "3"}).parse_args(["eval", "gqa"]).seed == 3
    assert plan_runs(Settings(methods=("random",), seed=3, reference=False))[0].method.hyper()["seed"] == 3
