"""The store of results: runs are found by their settings, finished ones are not repeated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval.command import settings_of
from llava_prune.eval.plan import Settings
from llava_prune.eval.run import evaluate_all, finished
from llava_prune.eval.stored import stored_runs
from llava_prune.methods.planner import Request
from llava_prune.parsers import make_parser
from llava_prune.report.store import StoredRun, read_result


def nothing(*_: Any) -> Any:
    return lambda *_: None


@pytest.fixture
def settings(nine: Path, tmp_path: Path) -> Settings:
    """Return settings of two methods on GQA and POPE, with results in a store."""
    model = tmp_path / "some-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    store = str(tmp_path / "store")
    return Settings(
        "gqa,pope", str(model), methods=("autoprune", "random"), tokens=(4,), data=str(nine), batch=2, store=store
    )


def files(settings: Settings) -> dict[str, int]:
    """Return the modification time of each result and answer file."""
    found = (p for name in ("result.json", "answers.jsonl") for p in Path(settings.store).rglob(name))
    return {p.relative_to(settings.store).as_posix(): p.stat().st_mtime_ns for p in found}


def contents(settings: Settings) -> dict[str, Any]:
    """Return the results without their times."""
    found = {}
    for path in Path(settings.store).rglob("result.json"):
        result = json.loads(path.read_text())
        found[str(path)] = {k: v for k, v in result.items() if k != "seconds"}
    return found


def test_a_second_call_loads_nothing(settings: Settings, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in()
    assert finished(settings) is None
    first, failed = evaluate_all(settings, nothing)
    assert not failed and len(files(settings)) == 12
    before = files(settings)
    monkeypatch.setattr("llava_prune.eval.run.load_model", lambda _: pytest.fail("a model was loaded"))
    found = finished(settings)
    assert found is not None and list(found) == ["gqa", "pope"] and files(settings) == before
    for name, runs in found.items():
        assert [r["label"] for r in runs] == ["full", "autoprune-4", "random-4"]
        assert [r["figure"] for r in runs] == [r["figure"] for r in first[name]]
    assert finished(dataclasses.replace(settings, restart=True)) is None
    assert finished(dataclasses.replace(settings, num_chunks=2, chunk_idx=1)) == found
    with pytest.raises(ValueError, match=r"CHUNK_IDX=2 is outside 0\.\.1"):
        finished(dataclasses.replace(settings, num_chunks=2, chunk_idx=2))


@pytest.mark.parametrize("name", ["result.json", "answers.jsonl"])
def test_one_file_away_repeats_one_run(settings: Settings, stand_in: Any, name: str) -> None:
    stand_in()
    evaluate_all(settings, nothing)
    before, whole = files(settings), contents(settings)
    gone = f"pope/some-model/random-4/{name}"
    content = (Path(settings.store) / gone).read_text()
    (Path(settings.store) / gone).unlink()
    assert finished(settings) is None
    model = stand_in()
    evaluate_all(settings, nothing)
    assert sum(map(len, model.calls)) == (12 if name == "answers.jsonl" else 0)
    now = files(settings)
    assert contents(settings) == whole
    assert {k for k in before if now[k] != before[k]} <= {f"pope/some-model/random-4/{n}.{e}" for n, e in (
        ("result", "json"), ("answers", "jsonl"))}  # fmt: skip
    if name == "answers.jsonl":
        assert (Path(settings.store) / gone).read_text() == content
    assert finished(settings) is not None


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"batch": 3}, {"tokens": (5,)}, {"limit": 2}, {"method_args": {"lam": 0.5}}],
)
def test_other_settings_are_other_runs(settings: Settings, stand_in: Any, change: dict[str, Any]) -> None:
    stand_in()
    evaluate_all(settings, nothing)
    before = files(settings)
    assert finished(dataclasses.replace(settings, **change)) is None
    evaluate_all(dataclasses.replace(settings, **change), nothing)
    now = files(settings)
    assert {k: now[k] for k in before} == before, "an earlier run was touched"
    assert len(now) > len(before) and finished(dataclasses.replace(settings, **change)) is not None
    assert finished(settings) is not None


def test_other_files_are_noticed(settings: Settings, nine: Path, stand_in: Any) -> None:
    """The stamp changes with any file; then equal weights are accepted, and edited answers are refused."""
    stand_in()
    evaluate_all(settings, nothing)
    (Path(settings.model) / "config.json").write_text("{ }")
    assert finished(settings) is None
    model = stand_in()
    evaluate_all(settings, nothing)
    assert not model.calls, "the weights are the same"
    answers = Path(settings.store) / "gqa/some-model/random-4/answers.jsonl"
    answers.write_text(answers.read_text().replace('"text": "', '"text": "x', 1))
    assert finished(settings) is None
    _, failed = evaluate_all(settings, nothing)
    assert "was edited, or is an answer of another run" in failed["gqa"]


def test_a_sweep_and_an_evaluation_share_runs(settings: Settings, stand_in: Any) -> None:
    stand_in()
    evaluate_all(dataclasses.replace(settings, requests=[Request(["autoprune"], [4], {"lam": 0.5})]), nothing)
    assert Path(settings.store, "gqa/some-model/autoprune-4,lam=0.5/result.json").is_file()
    same = dataclasses.replace(settings, methods=("autoprune",), method_args={"lam": 0.5})
    found = finished(same)
    assert found is not None and found["gqa"][1]["settings"]["hyper"]["lam"] == 0.5


def test_one_model_for_every_path_to_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(settings.model).parent)
    for name in (settings.model, f"{settings.model}/", "some-model", "./some-model"):
        args = make_parser({}).parse_args(["eval", "gqa", "--model", name, "--model-base", name])
        found = settings_of(args)
        assert found.model == found.model_base == "some-model"


def test_out_is_a_folder_of_its_own(settings: Settings, tmp_path: Path, stand_in: Any) -> None:
    """With OUT, other settings are refused."""
    stand_in()
    given = dataclasses.replace(settings, out=str(tmp_path / "out"))
    evaluate_all(given, nothing)
    assert (tmp_path / "out/gqa/full/result.json").is_file() and finished(given) is not None
    _, failed = evaluate_all(dataclasses.replace(given, seed=1), nothing)
    assert "made with seed=0, now it is 1" in failed["gqa"]


def test_dry_run_finds_the_runs(settings: Settings, stand_in: Any, capsys: Any) -> None:
    stand_in()
    evaluate_all(settings, nothing)
    evaluate_all(dataclasses.replace(settings, seed=1), nothing)
    argv = ["--model", settings.model, "--data", settings.data, "--store", settings.store, "--dry-run", "--json"]
    file = Path(settings.store) / "sweep.yaml"
    file.write_text("tasks: [gqa]\nmethods: [random]\ntokens: [4, 5]\n")
    assert main(["sweep", str(file), *argv, "--seed", "1", "--batch", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["label"], r["left"]) for r in rows] == [("full", 0), ("random-4", 0), ("random-5", 4)]


def test_the_difference_to_the_unpruned_model_stays(settings: Settings, stand_in: Any) -> None:
    """The difference is the same if runs are made together or apart, and after a call without the unpruned model."""
    stand_in()
    alone = dataclasses.replace(settings, reference=False)
    evaluate_all(alone, nothing)
    evaluate_all(dataclasses.replace(settings, methods=("full",)), nothing)
    assert finished(settings) is None, "nothing has compared them yet"
    evaluate_all(settings, nothing)
    whole = contents(settings)
    assert sum("difference_to_full" in r for r in whole.values()) == 2, "the stand-in has no figure in POPE"
    (Path(settings.store) / "gqa/some-model/full/result.json").write_text("{}")
    evaluate_all(alone, nothing)
    evaluate_all(settings, nothing)
    assert contents(settings) == whole


def test_what_the_stamp_covers(settings: Settings, nine: Path, tmp_path: Path, stand_in: Any) -> None:
    """The stamp covers the scores and exported files of a run, and a vision tower outside the checkpoint."""
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "weights").write_text("1")
    (Path(settings.model) / "config.json").write_text(json.dumps({"mm_vision_tower": str(tower)}))
    stand_in()
    evaluate_all(settings, nothing)
    assert finished(settings) is not None
    run = Path(settings.store) / "gqa/some-model/random-4"
    for path in (run / "scores.jsonl", run / "testdev_balanced_predictions.json", tower / "weights"):
        before = path.read_text()
        path.write_text(before + " ")
        assert finished(settings) is None, path
        evaluate_all(settings, nothing)
        assert finished(settings) is not None
        assert path.parent == tower or path.read_text() == before


def test_the_run_that_was_asked_for(settings: Settings, stand_in: Any) -> None:
    """Runs that differ in batch size, precision, data or device are found only by the settings that made them."""
    stand_in()
    evaluate_all(settings, nothing)
    other = dataclasses.replace(settings, batch=3)
    evaluate_all(other, nothing)
    request = Request(["random"], [4])
    for given in (settings, other, settings):
        (((_, runs),),) = stored_runs(given, [request], ["gqa", "pope"])
        assert {r.result["settings"]["batch"] for r in runs.values()} == {given.batch} and len(runs) == 2
    for change in ({"batch": 4}, {"dtype": "float16"}, {"data": settings.store}, {"device": "cuda:1"}):
        (((_, runs),),) = stored_runs(dataclasses.replace(settings, **change), [request], ["gqa"])
        assert not runs, change


def test_the_values_of_a_preset_are_its_defaults(settings: Settings, stand_in: Any) -> None:
    stand_in()
    evaluate_all(dataclasses.replace(settings, methods=("fastv:keep58",)), nothing)
    run = StoredRun(folder := Path(settings.store) / "gqa/some-model/fastv-keep58", read_result(folder / "result.json"))
    assert run.hyper["keep"] == run.defaults["keep"] == 58 and run.name == "fastv-keep58" and not run.varied
