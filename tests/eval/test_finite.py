"""For NaN or infinite logits, a run names the question and the module and has no figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_prune.cli import main
from llava_prune.eval import run
from llava_prune.eval.answers import ANSWERS, RESULT, SCORES
from llava_prune.eval.finite import Logits
from llava_prune.eval.identity import vision_tower
from llava_prune.eval.plan import Settings
from llava_prune.models.load import Loaded
from tests import models
from tests.eval.kill import DATA, Letters, checkpoint

LIMIT, MARK = 6, 1e30


@pytest.fixture(params=["hf", "llava"])
def loaded(request: Any, tmp_path: Path) -> Loaded:
    made = checkpoint(tmp_path / "model")
    model = models.tiny_hf() if request.param == "hf" else models.tiny_llava()
    return Loaded(model, Letters(), made.image_processor, request.param, made.path)


def settings(loaded: Loaded, out: Path, **more: Any) -> Settings:
    return Settings(
        model=loaded.path, data=DATA, out=str(out), limit=LIMIT, batch=3, tokens=(8,), max_new_tokens=3, **more
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / ANSWERS).read_text().splitlines()]


def mark(loaded: Loaded) -> list[str]:
    """Set a huge embedding for a letter that only some questions contain; return the ids of those questions."""
    lines = (Path(DATA) / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()[:LIMIT]
    asked = {q["question_id"]: set(q["text"]) for q in map(json.loads, lines)}
    everywhere = set(map(chr, range(128)))
    letter = next(c for c in sorted(everywhere) if 0 < sum(c in text for text in asked.values()) <= LIMIT // 2)
    system = "A chat between a curious user and an artificial intelligence assistant. ASSISTANT USER:"
    assert letter not in system
    loaded.model.get_input_embeddings().weight.data[3 + ord(letter) % 120] = MARK
    return [i for i, text in asked.items() if letter in text]


def overflow(module: Any, inputs: Any, output: Any) -> Any:
    """Replace the output of a layer by NaN for the samples with a huge hidden state; a forward hook."""
    states = output[0] if isinstance(output, tuple) else output
    bad = states.abs().flatten(1).amax(1) > MARK / 2
    states = states.masked_fill(bad[:, None, None], float("nan"))
    return (states, *output[1:]) if isinstance(output, tuple) else states


def break_module(loaded: Loaded, where: str) -> None:
    """Make the projector, or a module inside the vision tower, return NaN."""
    inner = loaded.model.model
    if where == "the vision tower":
        (module,) = [m for n, m in vision_tower(loaded).named_modules() if n.endswith("layers.0.layer_norm1")]
    else:
        module = (inner.multi_modal_projector if loaded.family == "hf" else inner.mm_projector).get_submodule(
            "linear_2" if loaded.family == "hf" else "2"
        )
    module.register_forward_hook(lambda m, inputs, output: output * float("nan"))


@pytest.mark.parametrize("where", ["layer 3 of the language model", "the projector", "the vision tower"])
def test_the_question_and_the_module_are_named(where: str, loaded: Loaded, tmp_path: Path) -> None:
    if where.startswith("layer"):
        models.language_model(loaded.model).layers[3].register_forward_hook(overflow)
        marked = mark(loaded)
    else:
        break_module(loaded, where)
        marked = []
    results = run.evaluate(settings(loaded, tmp_path), loaded=loaded)
    assert [r["label"] for r in results] == ["full", "autoprune-8"]
    for result in results:
        answered = rows(tmp_path / result["label"])
        found = {r["question_id"]: r["not_finite"] for r in answered if "not_finite" in r}
        assert list(found) == (marked or [r["question_id"] for r in answered]) and set(found.values()) == {where}
        stored = json.loads((tmp_path / result["label"] / RESULT).read_text())
        json.dumps(stored, allow_nan=False)
        scores = [json.loads(x) for x in (tmp_path / result["label"] / SCORES).read_text().splitlines()]
        assert [s["question_id"] for s in scores] == [r["question_id"] for r in answered]
        assert all(s["score"] in (0.0, 1.0) for s in scores)
        assert stored["figure"] is result["figure"] is None and stored["interval"] is None
        assert stored["details"] == {"not_finite": len(found)}
        assert stored["why_no_figure"].startswith(
            f"the logits of {len(found)} of {LIMIT} questions are NaN or infinite, first question_id {min(found)} in "
            f"{where}, so there is no figure"
        )
    again = run.evaluate(settings(loaded, tmp_path), loaded=loaded)  # a finished run repeats the reason
    assert [r["why_no_figure"] for r in again] == [r["why_no_figure"] for r in results]


def test_logits_that_overflow_in_the_head(loaded: Loaded, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """If finite weights give infinite logits, the command fails and names the output embeddings."""
    loaded.model.get_output_embeddings().weight.data[:] = 3e38
    monkeypatch.setattr("llava_prune.eval.asking.load_model", lambda settings: loaded)
    argv = ["eval", "gqa", "--model", loaded.path, "--limit=3", f"--out={tmp_path / 'o'}", "--tokens=8", "--batch=3"]
    assert main(argv) == 1
    got = capsys.readouterr()
    assert "llava-prune: gqa: the logits of 3 of 3 questions are NaN or infinite" in got.err
    assert "in the output embeddings" in got.err and "Traceback" not in got.err
    assert json.loads((tmp_path / "o" / "full" / RESULT).read_text())["figure"] is None


def test_finite_logits_are_not_flagged(loaded: Loaded, tmp_path: Path) -> None:
    results = run.evaluate(settings(loaded, tmp_path / "out"), loaded=loaded)
    assert all(r["figure"] is not None and r["why_no_figure"] is None for r in results)
    assert not any("not_finite" in r for label in ("full", "autoprune-8") for r in rows(tmp_path / "out" / label))


def test_one_step_is_enough() -> None:
    """Logits that are not finite at any step flag their sample, and the next request starts without flags."""
    seen = Logits()
    steps = [[[0.0, float("inf")], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]  # (step, sample, vocabulary)
    for step in steps:
        seen.see(None, None, torch.tensor(step)[:, None])
    assert seen.take() == [True, False] and seen.take() == []
    seen.see(None, None, torch.tensor(steps[1])[:, None])
    assert seen.take() == [False, False]
    padded = torch.tensor([[[float("nan")] * 2, [0.0, 1.0]]])  # a position before the last does not count
    seen.see(None, None, padded)
    assert seen.take() == [False]
