"""Evaluations with a stand-in for the model: resuming, settings, lack of memory, bad input."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_prune
from llava_prune.arguments import parse_args
from llava_prune.cli import main
from llava_prune.eval import run
from llava_prune.eval.answers import ANSWERS, JOURNAL, RESULT, SCORES, Answers
from llava_prune.eval.journal import Journal
from llava_prune.eval.plan import Settings, plan_runs
from llava_prune.eval.result import flops_figures
from llava_prune.ops.counts import Size
from llava_prune.report.store import model_id

N = 7


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write seven questions about two images whose right answers are all "yes"; return the data folder."""
    base = tmp_path / "data" / "gqa"
    (base / "data" / "images").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((4, 6, 3), 40 * i, np.uint8)).save(base / "data" / "images" / f"n{i}.png")
    rows = [{"question_id": str(i), "image": f"n{i % 2}.png", "text": "Is it" + " so" * i + "?"} for i in range(N)]
    (base / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = {str(i): {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}} for i in range(N)}
    (base / "data" / "testdev_balanced_questions.json").write_text(json.dumps(labels))
    return tmp_path / "data"


def settings(data: Path, out: Path, **more: Any) -> Settings:
    return Settings(**{"model": "a/b", "data": str(data), "out": str(out), "tokens": (4,), "batch": 2, **more})


def rows(folder: Path) -> list[dict]:
    lines = (folder / ANSWERS).read_text().splitlines()
    return [json.loads(x) for x in lines]


def test_a_whole_run(data: Path, tmp_path: Path, stand_in: Any) -> None:
    model = stand_in()
    full, pruned = run.evaluate(settings(data, tmp_path / "out", methods=("autoprune",)))
    assert [full["label"], pruned["label"]] == ["full", "autoprune-4"]
    assert sorted(model.fresh) == ["n0.png", "n1.png"], "an image went through the tower twice"
    first = rows(tmp_path / "out" / "full")
    assert [r["question_id"] for r in first] == [str(i) for i in range(N)]
    assert set(first[0]) == {
        "question_id", "prompt", "text", "answer_id", "model_id", "metadata", "kept", "stats"
    }  # fmt: skip
    assert first[0]["model_id"] == "b" and first[0]["metadata"] == {} and first[0]["text"] in ("Yes.", "no")
    assert pruned["visual_tokens"]["average_leaving"] == 4 and pruned["difference_to_full"]["points"] == 0
    assert pruned["flops"]["visual_only_entering"]["percent_of_full"] < 30
    stored = json.loads((tmp_path / "out" / "autoprune-4" / "result.json").read_text())
    assert (
        stored["figure"] == pruned["figure"] and "scores" not in stored and set(stored["seconds"]) >= {"load", "tower"}
    )
    assert not (tmp_path / "out" / "full" / JOURNAL).exists()


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupted_run_resumes(data: Path, tmp_path: Path, stand_in: Any, at: int) -> None:
    whole = stand_in()
    run.evaluate(settings(data, tmp_path / "whole"))
    stand_in({at: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(settings(data, tmp_path / "cut"))
    journal = tmp_path / "cut" / "full" / JOURNAL
    if at > 1:
        with open(journal, "ab") as handle:
            handle.write(b'{"question_id": "0", "te')  # a line that the interruption cut off
    again = stand_in()
    run.evaluate(settings(data, tmp_path / "cut"))
    assert len(again.calls) == len(whole.calls) - (at - 1), "an answered batch was run again"
    for label in ("full", "autoprune-4"):
        assert rows(tmp_path / "cut" / label) == rows(tmp_path / "whole" / label)


@pytest.mark.parametrize("left", [1, 3, 5])
def test_a_batch_of_which_a_part_is_on_disk_is_asked_whole(
    data: Path, tmp_path: Path, stand_in: Any, left: int
) -> None:
    """A batch has the same members as in an uninterrupted run, because padding can change the last bits of logits."""
    whole = stand_in()
    run.evaluate(settings(data, tmp_path / "whole", reference=False, batch=3))
    stand_in({3: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(settings(data, tmp_path / "cut", reference=False, batch=3))
    journal = tmp_path / "cut" / "autoprune-4" / JOURNAL
    journal.write_bytes(b"".join(x + b"\n" for x in journal.read_bytes().split(b"\n")[:left]))
    again = stand_in()
    run.evaluate(settings(data, tmp_path / "cut", reference=False, batch=3))
    assert again.calls == whole.calls[left // 3 :] and [len(c) for c in whole.calls] == [3, 3, 1]
    assert rows(tmp_path / "cut" / "autoprune-4") == rows(tmp_path / "whole" / "autoprune-4")


def test_flops_of_prompts_without_an_image() -> None:
    """Only the text of a prompt without an image counts, in the pruned and in the unpruned model."""
    size = Size(layers=2, hidden=8, intermediate=16, visual=16)
    image = {"kept": {"entering": [16, 4], "leaving": [4, 4]}}
    text = {"kept": {"entering": [0, 0], "leaving": [0, 0]}}

    def layer(n: int) -> int:
        return 4 * n * 8 * 8 + 2 * n * n * 8 + 3 * n * 8 * 16  # equation (2)

    got = flops_figures([image, text, text], [10, 6, 30], size)
    assert got["text_tokens"] == pytest.approx(46 / 3)
    plain = 2 * layer(6) + 2 * layer(30)
    pruned, full = layer(26) + layer(14) + plain, 2 * layer(26) + plain
    assert got["with_text_entering"]["percent_of_full"] == pytest.approx(100 * pruned / full)
    assert got["with_text_entering"]["tflops"] == pytest.approx(pruned / 3 / 1e12)
    only = layer(16) + layer(4)
    assert got["visual_only_entering"]["percent_of_full"] == pytest.approx(100 * only / (2 * layer(16)))
    assert flops_figures([text], [6], size)["visual_only_entering"]["percent_of_full"] is None
    dropped = {"kept": {"entering": [0, 0], "leaving": [0, 0], "image": True}}  # method text-only, which drops them all
    got = flops_figures([dropped], [6], size)
    assert got["visual_only_entering"]["percent_of_full"] == 0
    assert got["with_text_entering"]["percent_of_full"] == pytest.approx(100 * layer(6) / layer(22))


def test_a_finished_run_is_not_repeated(data: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in()
    first = run.evaluate(settings(data, tmp_path / "out"))
    model = stand_in()
    second = run.evaluate(settings(data, tmp_path / "out"))
    assert model.calls == [] and [r["figure"] for r in first] == [r["figure"] for r in second]
    assert second[0]["seconds"]["generate"] == first[0]["seconds"]["generate"]
    run.evaluate(settings(data, tmp_path / "out", restart=True))
    assert model.calls


def test_scores_are_written_with_the_result_and_removed_by_a_restart(data: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in()
    (full,) = run.evaluate(settings(data, tmp_path, methods=("full",)))
    path = tmp_path / "full" / SCORES
    before = path.read_bytes()
    scores = [json.loads(line)["score"] for line in before.splitlines()]
    assert 100 * sum(scores) / N == pytest.approx(full["figure"]) and 0 < sum(scores) < N
    path.unlink()  # as of a run without scores
    run.evaluate(settings(data, tmp_path, methods=("full",)))
    assert path.read_bytes() == before
    stand_in({1: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(settings(data, tmp_path, methods=("full",), restart=True))
    assert not path.exists() and not (tmp_path / "full" / RESULT).exists()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"limit": 3}, {"batch": 3}, {"model": "a/c"}, {"method_args": {"k0": 0.3}}]
)
def test_other_settings_are_refused(data: Path, tmp_path: Path, stand_in: Any, other: dict) -> None:
    stand_in()
    run.evaluate(settings(data, tmp_path / "out"))
    with pytest.raises(ValueError, match="were made with (seed|limit|batch|model|hyper.k0)=.*--restart"):
        run.evaluate(settings(data, tmp_path / "out", **other))


def test_batch_is_halved_when_memory_runs_out(data: Path, tmp_path: Path, stand_in: Any) -> None:
    model = stand_in({1: torch.OutOfMemoryError("no")})
    run.evaluate(settings(data, tmp_path / "out", batch=4, reference=False))
    assert [len(c) for c in model.calls] == [4, 2, 2, 2, 1]
    assert len(rows(tmp_path / "out" / "autoprune-4")) == N
    stand_in({1: torch.OutOfMemoryError("no")})
    with pytest.raises(torch.OutOfMemoryError):
        run.evaluate(settings(data, tmp_path / "one", batch=1))


def test_memory_of_the_host(data: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    """If torch raises a plain RuntimeError for lack of host memory, the batch is halved; a single question fails."""
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40246378225 bytes")
    model = stand_in({1: full})
    run.evaluate(settings(data, tmp_path / "out", batch=4, reference=False))
    assert [len(c) for c in model.calls] == [4, 2, 2, 2, 1]
    stand_in({1: full})
    argv = ["eval", "gqa", "--model=a/b", f"--data={data}", f"--out={tmp_path / 'o'}", "--batch=1", "--tokens=4"]
    status, err = call(capsys, *argv)
    assert status == 1 and "out of memory with a single sample" in err
    stand_in({1: RuntimeError("another")})
    with pytest.raises(RuntimeError, match="another"):
        run.evaluate(settings(data, tmp_path / "two"))


def test_an_error_of_a_method_names_the_run(data: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in({1: ValueError("tokens=4: too few")})
    with pytest.raises(ValueError, match="^autoprune-4: tokens=4: too few$"):
        run.evaluate(settings(data, tmp_path / "out", reference=False))


def test_a_budget_out_of_reach_is_refused_first(data: Path, tmp_path: Path, stand_in: Any) -> None:
    model = stand_in()
    with pytest.raises(ValueError, match=r"^fastv-2: tokens=2: .*; give at least 3$"):
        run.evaluate(settings(data, tmp_path / "out", methods=("fastv",), tokens=(2,)))
    assert model.calls == [] and not (tmp_path / "out").exists()


def test_a_smaller_batch_stays_for_the_method(data: Path, tmp_path: Path, stand_in: Any) -> None:
    """The batch size falls from 4 to 2 and to 1 after two failures; the next method starts with the given size."""
    model = stand_in({1: torch.OutOfMemoryError("no"), 2: torch.OutOfMemoryError("no")})
    run.evaluate(settings(data, tmp_path / "out", batch=4))
    assert [len(c) for c in model.calls] == [4, 2, *[1] * N, 4, 3]
    assert rows(tmp_path / "out" / "full") and len(rows(tmp_path / "out" / "autoprune-4")) == N


def test_memory_that_runs_out_in_a_layer(tiny_models: Any) -> None:
    """The exception leaves no state: after it, each half of the batch gives the same answer as before."""
    from tests import models

    model = tiny_models["hf"]
    ask = models.loaded(model).generate
    prompts, pixels = [models.prompt(5, 9), models.prompt(3, 6, seed=1)], models.pixels(2)
    layer = models.language_model(model).layers[2]

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    with llava_prune.pruned(model, "autoprune", tokens=10):
        want = [ask([p], pixels[i : i + 1], max_new_tokens=3) for i, p in enumerate(prompts)]
        hook = layer.register_forward_pre_hook(full)
        with pytest.raises(torch.OutOfMemoryError):
            ask(prompts, pixels, max_new_tokens=3)
        hook.remove()
        again = [ask([p], pixels[i : i + 1], max_new_tokens=3) for i, p in enumerate(prompts)]
    assert [x.tolist() for x in again] == [x.tolist() for x in want]


def test_auto_batch_follows_free_memory(tiny_models: Any, monkeypatch: Any) -> None:
    """The batch size is half the free memory over the cost of a sample, as a power of two from 1 to 16 on a CPU."""
    from llava_prune.eval import asking
    from tests import models

    loaded = models.loaded(tiny_models["hf"])
    sizes = {}
    for shift in range(16, 40):
        monkeypatch.setattr(asking, "_free_memory", lambda free=1 << shift: free)
        sizes[shift] = asking.auto_batch(loaded, 128)
    assert sizes[16] == 1 and sizes[39] == 16 and set(sizes.values()) == {1, 2, 4, 8, 16}
    assert list(sizes.values()) == sorted(sizes.values())
    at = min(s for s, n in sizes.items() if n == 4)
    monkeypatch.setattr(asking, "_free_memory", lambda: 1 << at)
    assert asking.auto_batch(loaded, 2 * 128 + models.PATCHES) == 2, "prompts of twice the length, half the batch"


def test_auto_batch_on_gpus(tiny_models: Any, monkeypatch: Any) -> None:
    """The GPU with the least free memory determines the batch size."""
    from llava_prune.eval import asking
    from tests import models

    loaded = models.loaded(tiny_models["hf"])
    free = {torch.device("cuda:0"): 1 << 40, torch.device("cuda:1"): 1 << 40}
    monkeypatch.setattr(asking, "devices", lambda _: [*free, torch.device("cpu")])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1 << 41))
    assert asking.auto_batch(loaded, 128) == 64
    free[torch.device("cuda:1")] = 1 << 20
    assert asking.auto_batch(loaded, 128) < 64


def test_two_writers(tmp_path: Path) -> None:
    with Answers(tmp_path, {"a": 1}, {}), pytest.raises(ValueError, match="another run is writing"):
        Answers(tmp_path, {"a": 1}, {})


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(list(argv))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return status, err


def test_full_disk(data: Path, tmp_path: Path, stand_in: Any, capsys: Any, monkeypatch: Any) -> None:
    stand_in()
    before = Journal._write

    def write(self: Journal, rest: bytes, earlier: Any) -> None:
        if self.path.read_bytes().count(b"\n") >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(self, rest, earlier)

    monkeypatch.setattr(Journal, "_write", write)
    argv = [
        "eval",
        "gqa",
        "--model",
        "a/b",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
        "--batch=2",
        "--tokens=4",
    ]
    status, err = call(capsys, *argv)
    assert status == 1 and "no space left" in err
    assert len((tmp_path / "o" / "full" / JOURNAL).read_text().splitlines()) == 4
    monkeypatch.setattr(Journal, "_write", before)
    assert main([*argv, "--json"]) == 0
    assert [r["label"] for r in json.loads(capsys.readouterr().out)] == ["full", "autoprune-4"]


def test_bad_input_in_one_line(data: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    stand_in()
    base = ["eval", "gqa", "--model", "a/b", "--out", str(tmp_path / "o"), "--data"]
    assert call(capsys, *base, str(tmp_path / "none"))[0] == 1
    status, err = call(capsys, *base, str(data), "--tokens", "17")
    assert status == 1 and "TOKENS=17" in err and "16 visual tokens" in err
    status, err = call(capsys, *base, str(data), "--method", "nosuch")
    assert status == 1 and "unknown method 'nosuch'" in err
    status, err = call(capsys, *base, str(data), "--method-args", "nosuch=1")
    assert status == 1 and "nosuch" in err
    status, err = call(capsys, "eval", "nosuch")
    assert status == 1 and "known are gqa, mmbench" in err
    for name in ("n0.png", "n1.png"):
        (data / "gqa" / "data" / "images" / name).unlink()
    status, err = call(capsys, *base, str(data))
    assert status == 1 and "2 of 2 images are missing" in err and "n0.png, n1.png" in err
    with pytest.raises(SystemExit) as stop:
        main([*base, str(data), "--tokens", "many"])
    assert stop.value.code == 2


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert"}'])
def test_foreign_checkpoints(data: Path, tmp_path: Path, capsys: Any, content: str | None) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    status, err = call(capsys, "eval", "gqa", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "o"))
    assert status == 1 and "config.json" in err


def test_truncated_weights(data: Path, tmp_path: Path, tiny_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_path.iterdir():
        (folder / path.name).symlink_to(path)
    weights = (folder / "model.safetensors").resolve().read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    status, err = call(capsys, "eval", "gqa", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "o"))
    assert status == 1 and str(folder) in err.replace("\n", "")


def test_environment_sets_the_flags(data: Path, tmp_path: Path, stand_in: Any, capsys: Any, monkeypatch: Any) -> None:
    stand_in()
    for name, value in {"MODEL": "a/b", "DATA": str(data), "OUT": str(tmp_path / "o"), "TOKENS": "8,4"}.items():
        monkeypatch.setenv(name, value)
    assert main(["eval", "gqa", "--json", "--limit", "3"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [r["label"] for r in got] == ["full", "autoprune-8", "autoprune-4"] and got[0]["rows"] == 3


def test_score_command(data: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    stand_in()
    result = run.evaluate(settings(data, tmp_path / "out"))[0]
    argv = ["score", "gqa", "--answers", str(tmp_path / "out" / "full" / ANSWERS), "--data", str(data), "--json"]
    assert main(argv) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["bench"] == "gqa" and got["figure"] == result["figure"] and got["rows"] == N
    assert len(got["versions"]["annotations"]["sha256"]) == 64 and got["versions"]["annotations"]["rows"] == N


def test_hyper_parameters(tmp_path: Path) -> None:
    assert parse_args("mi_scale=8, budget=after,strict=false") == {"mi_scale": 8, "budget": "after", "strict": False}
    with pytest.raises(ValueError, match="name=value"):
        parse_args("mi_scale")
    (tmp_path / "llava_prune.json").write_text('{"method_args": {"autoprune": {"mi_scale": 8.0, "k0": 0.1}}}')
    made = plan_runs(
        Settings(model=str(tmp_path), tokens=(8, 4), methods=("autoprune", "random"), method_args={"k0": 0.2})
    )
    assert [r.label for r in made] == ["full", "autoprune-8", "autoprune-4", "random-8", "random-4"]
    assert made[1].method.hyper()["mi_scale"] == 8.0 and made[1].method.hyper()["k0"] == 0.2


def test_compositions_and_presets_in_a_plan(tmp_path: Path) -> None:
    """Hyper-parameters of a part apply in a composition; a preset with a budget ignores the budgets of the settings."""
    (tmp_path / "llava_prune.json").write_text(json.dumps({"method_args": {"autoprune": {"mi_scale": 8.0}}}))
    names = ("visionzip+autoprune", "visionzip:32+fastv:keep64", "fastervlm:192+vtw", "pdrop:128")
    made = plan_runs(Settings(model=str(tmp_path), tokens=(8, 4), methods=names, reference=False))
    assert [(r.label, r.tokens) for r in made] == [
        ("visionzip+autoprune-8", 8), ("visionzip+autoprune-4", 4), ("visionzip-32+fastv-keep64", None),
        ("fastervlm-192+vtw-8", 8), ("fastervlm-192+vtw-4", 4), ("pdrop-128-128", 128),
    ]  # fmt: skip
    assert made[0].method.hyper()["mi_scale"] == 8.0 and made[0].method.hyper()["vision_tokens"] == 20
    assert made[3].method.hyper()["vision_tokens"] == 192


def test_all_methods() -> None:
    made = plan_runs(Settings(tokens=(8,), methods=("all", "random")))
    assert made[0].name == "full" and sorted(r.name for r in made) == llava_prune.names()


def test_model_id() -> None:
    assert model_id("playground/models/llava-tiny/") == "llava-tiny"
    assert model_id("/x/run/checkpoint-500") == "run_checkpoint-500"
