"""Evaluations of all nine benchmarks with a stand-in for the model: prompts, files, chunks, data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_prune.cli import main
from llava_prune.eval import run
from llava_prune.eval.answers import ANSWERS, SCORES
from llava_prune.eval.data import inspect
from llava_prune.eval.plan import Settings
from llava_prune.eval.prompt import first_turn
from llava_prune.eval.score import score_files
from llava_prune.eval.task import Sources, load_task, questions_of, task_names

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))["prompts"]
FOLDERS = {"sqa": "sqa", "mme": "MME", "ocrbench": "OCRBench"}
SIZES = {
    "gqa": 4,
    "sqa": 4,
    "textvqa": 4,
    "pope": 12,
    "mme": 4,
    "mmbench": 4,
    "mmbench_cn": 4,
    "ocrbench": 4,
    "vqav2": 4,
}


def settings(data: Path, out: Path, task: str, **more: Any) -> Settings:
    return Settings(
        **{"task": task, "model": "a/b", "data": str(data), "out": str(out), "tokens": (4,), "batch": 3, **more}
    )


def answers(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / ANSWERS).read_text(encoding="utf-8").splitlines()]


def scores(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / SCORES).read_text(encoding="utf-8").splitlines()]


TYPES = {
    "gqa": {"verify"},
    "sqa": {"image", "text"},
    "textvqa": {None},
    "pope": {"adversarial", "random", "popular"},
    "mme": {"count", "scene"},
    "mmbench": {"kind"},
    "mmbench_cn": {"kind"},
    "ocrbench": {"Scene Text-centric VQA"},
    "vqav2": {"yes/no"},
}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_run_and_score_agree(nine: Path, tmp_path: Path, stand_in: Any, name: str) -> None:
    model = stand_in()
    full, pruned = run.evaluate(settings(nine, tmp_path, name))
    assert model.limits == {1024 if name in ("sqa", "mmbench", "mmbench_cn") else 128}
    rows = answers(tmp_path / "full")
    sources = Sources(load_task(name), nine)
    questions = questions_of(sources)
    assert [r["question_id"] for r in rows] == [q.id for q in questions] and len(rows) == SIZES[name]
    assert [r["prompt"] for r in rows] == [q.stored for q in questions]
    scored, written, _ = score_files(name, tmp_path / "full" / ANSWERS, nine / FOLDERS.get(name, name))
    assert scored["figure"] == full["figure"] and scored["details"] == full["details"]
    assert scored["versions"].items() <= full["files"].items()
    if full["figure"] is not None:  # POPE's F1 is undefined for these answers
        assert pruned["difference_to_full"]["points"] == 0
    found = scores(tmp_path / "full")
    assert [s["question_id"] for s in found] == [r["question_id"] for r in rows]
    assert all(set(s) == {"question_id", "score", "type"} and 0 <= s["score"] <= 1 for s in found)
    assert {s["type"] for s in found} == TYPES[name]
    for path in written:
        ours = (
            tmp_path
            / "full"
            / path.relative_to(tmp_path / "full" / "answers_official").as_posix().replace("answers", "full")
        )
        assert ours.exists()


def test_several_on_one_model(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    model = stand_in()
    loads: list[Any] = []
    run.load_model = (lambda before: lambda s: loads.append(s) or before(s))(run.load_model)  # undone by stand_in
    argv = ["eval", "all", "--model=a/b", f"--data={nine}", f"--out={tmp_path}", "--tokens=4", "--batch=8"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert len(loads) == 1 and "all benchmarks" in text
    for name in task_names():
        assert (tmp_path / name / "autoprune-4" / ANSWERS).is_file()
        assert load_task(name).title in text
    assert len(model.calls) >= 18


def test_results_of_finished_runs(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    """`llava-prune results` reads what `llava-prune eval` writes."""
    stand_in()
    argv = ["eval", "all", "--model=a/b", f"--data={nine}", f"--out={tmp_path}", "--tokens=4", "--json"]
    assert main(argv) == 0
    written = {(r["bench"], r["label"]): r for r in json.loads(capsys.readouterr().out)}
    assert main(["results", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["bench"], r["label"]) for r in found] == [(n, x) for n in task_names() for x in ("full", "autoprune-4")]
    for row in found:
        result = written[row["bench"], row["label"]]
        assert row["figure"] == result["figure"] and row["questions"] == result["rows"] and row["model"] == "a/b"
        assert row["average_leaving"] == result["visual_tokens"]["average_leaving"]
        assert row["difference_to_full"] == result.get("difference_to_full", {}).get("points")
    for name in task_names():
        assert main(["results", str(tmp_path), "--json", "--compare", f"{name}/full", f"{name}/autoprune-4"]) == 0
        got = json.loads(capsys.readouterr().out)
        assert got["total"]["questions"] == SIZES[name] and got["flips"] == [] and got["unscored"] == 0


def test_one_that_fails_does_not_stop_the_others(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    stand_in()
    data = tmp_path / "data"
    for name in ("gqa", "vqav2"):
        shutil.copytree(nine / name, data / name)
    (data / "gqa" / "data" / "images" / "n0.png").unlink()
    argv = ["eval", "all", "--model=a/b", f"--data={data}", f"--out={tmp_path / 'o'}", "--tokens=4", "--json"]
    assert main(argv) == 1
    got = capsys.readouterr()
    assert {r["bench"] for r in json.loads(got.out)} == {"vqav2"}
    assert "gqa: 1 of 2 images are missing" in got.err
    assert main(["eval", "all", f"--data={tmp_path / 'o'}"]) == 1
    assert "no benchmark's files" in capsys.readouterr().err


def test_text_only_rows_have_batches_of_their_own(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    model = stand_in()
    (full,) = run.evaluate(settings(nine, tmp_path, "sqa", methods=("full",), batch=4))
    assert [len(c) for c in model.calls] == [2, 2] and full["details"]["image"]["rows"] == 2
    assert full["visual_tokens"]["average_leaving"] == 16, "the mean is over questions with an image"
    rows = answers(tmp_path / "full")
    assert [r["prompt"].startswith("<image>\n") for r in rows] == [True, False, True, False]
    assert [sum(r["kept"]["entering"]) > 0 for r in rows] == [True, False, True, False]


def test_prompts_of_option_benchmarks(tmp_path: Path) -> None:
    from llava_prune.eval.tasks import mmbench

    for name, task in (("mmbench_en", "mmbench"), ("mmbench_cn", "mmbench_cn")):
        case = PROMPTS[name]
        stored = mmbench.text_of(case["row"])
        assert stored == case["stored_prompt"]
        assert first_turn(load_task(task).complete(stored)) == case["prompt"]
    for name in ("scienceqa_image", "scienceqa_text_only"):
        case = PROMPTS[name]
        row = {
            "id": "1",
            "conversations": [{"from": "human", "value": case["human_value"]}, {"from": "gpt", "value": "A"}],
        }
        if "image" in name:
            row["image"] = "1/image.png"
        (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps([row]))
        (question,) = questions_of(Sources(load_task("sqa"), tmp_path))
        assert question.stored == case["stored_prompt"]
        assert first_turn(question.text, question.image is not None) == case["prompt"]
    case = PROMPTS["ocrbench (script LLaVA1_5.py)"]
    assert first_turn(load_task("ocrbench").complete(case["question"])) == case["prompt"]


def test_chunks(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    stand_in()
    whole = run.evaluate(settings(nine, tmp_path / "whole", "pope", batch=12))
    parts = [settings(nine, tmp_path / "cut", "pope", batch=12, num_chunks=3, chunk_idx=i) for i in range(3)]
    assert run.evaluate(parts[2]) == [] and run.evaluate(parts[0]) == []
    assert [r["question_id"] for r in map(json.loads, (tmp_path / "cut/full/3_0.jsonl").read_text().splitlines())] == [
        1,
        2,
        3,
        4,
    ]
    joined = run.evaluate(parts[1])
    assert [r["figure"] for r in joined] == [r["figure"] for r in whole]
    for label in ("full", "autoprune-4"):
        for file in (ANSWERS, SCORES):
            assert (tmp_path / "cut" / label / file).read_bytes() == (tmp_path / "whole" / label / file).read_bytes()
    with pytest.raises(ValueError, match="CHUNK_IDX=3 is outside 0..2"):
        run.evaluate(settings(nine, tmp_path / "x", "pope", num_chunks=3, chunk_idx=3))
    with pytest.raises(ValueError, match="leave it empty; use NUM_CHUNKS=6"):
        run.evaluate(settings(nine, tmp_path / "x", "pope", num_chunks=8, chunk_idx=7))
    argv = ["eval", "pope", "--model=a/b", f"--data={nine}", f"--out={tmp_path / 'y'}", "--tokens=4"]
    assert main([*argv, "--num-chunks", "2", "--chunk-idx", "0"]) == 0
    assert "chunk 0 of 2 done" in capsys.readouterr().out


def test_limit(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in()
    for name in sorted(SIZES):
        (got,) = run.evaluate(settings(nine, tmp_path / name, name, methods=("full",), limit=3))
        assert got["rows"] == (2 if name == "mme" else 3), name


def test_data_report(nine: Path, tmp_path: Path, capsys: Any) -> None:
    for name in task_names():
        report = inspect(name, nine)
        assert report["complete"] and not report["problems"], report
        found = {f["kind"]: f for f in report["files"]}
        assert found["questions"]["rows"] == SIZES[name] and found["questions"]["version"] == "unknown release"
        assert all(f["url"].startswith("https://") and f["source"] for f in report["files"])
    data = tmp_path / "pope"
    shutil.copytree(nine / "pope", data)
    (data / "val2014" / "c0.jpg").unlink()
    assert main(["data", "pope", "--data", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "not complete" in out and "1 of 2 images are missing" in out
    shutil.rmtree(data / "coco")
    assert main(["data", "pope", "--data", str(tmp_path), "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert next(f for f in report["files"] if f["kind"] == "annotations")["path"] is None


@pytest.mark.parametrize("name", sorted(SIZES))
def test_one_question(nine: Path, tmp_path: Path, stand_in: Any, name: str) -> None:
    """A single question has a figure, or the result says why not."""
    stand_in()
    full, pruned = run.evaluate(settings(nine, tmp_path, name, limit=1))
    for result in (full, pruned):
        assert (result["figure"] is None) == bool(result["why_no_figure"])
    if name == "mme":
        assert "one question was asked; ask 2 or more" in full["why_no_figure"]
