"""Questions per second of this package and of LLaVA's own program, with the same model and questions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_prune.eval import rate
from llava_prune.eval.plan import Settings


@pytest.fixture(scope="module")
def result(tmp_path_factory: Any) -> tuple[dict[str, Any], Path]:
    """Return the result for three questions and one round, and its file."""
    pytest.importorskip("llava")
    out = tmp_path_factory.mktemp("rate") / "sub" / "rate.json"
    args = ["--limit", "3", "--batch", "2,auto", "--method", "full,autoprune", "--repeats", "1", "--dtype", "float32"]
    stock = torch.Tensor.to
    assert rate.main([*args, "--out", str(out)]) == 0
    assert torch.Tensor.to is stock
    return json.loads(out.read_text()), out


def test_rows(result: Any) -> None:
    found, _ = result
    arms = ["full, batch 2", "autoprune, batch 2", "full, batch auto", "autoprune, batch auto", rate.LOADER]
    assert [r["arm"] for r in found["rows"]] == arms and found["questions"] == 3
    assert [r["tokens"] for r in found["rows"]] == [None, 64, None, 64, None]
    assert [r["batch"] for r in found["rows"]][:2] == [2, 2] and found["rows"][4]["batch"] == 1
    assert all(1 <= r["batch"] <= 16 for r in found["rows"]), "auto reports the size it chose"
    theirs = found["rows"][4]["per_second"]["median"]
    for row in found["rows"]:
        assert row["times_llava"]["median"] == pytest.approx(row["per_second"]["median"] / theirs)
    assert found["command"].startswith("python -m llava_prune.eval.rate --limit 3")


def test_the_same_questions_get_the_same_answers(result: Any) -> None:
    """The unpruned model gives the same answers through LLaVA's program."""
    same = [r["same_answers"] for r in result[0]["rows"]]
    assert same[0] == {"first": 1.0, "llava": 1.0} and same[4] == {"first": 1.0, "llava": 1.0}


def test_table(result: Any) -> None:
    from rich.console import Console

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rate.table(result[0]))
    text = console.export_text()
    assert "autoprune, batch 2, 64 tokens" in text and rate.LOADER in text
    assert f"{result[0]['rows'][0]['per_second']['median']:.2f}" in text


def test_ragged_padding_by_hand() -> None:
    """Two samples with 10 text tokens and 2 and 0 visual tokens in the second layer, and a batch of one sample."""
    questions = [SimpleNamespace(image="a")] * 3
    rows, files = [[0] * 11, [0] * 11, [0] * 6], SimpleNamespace(questions=questions)
    bench: Any = SimpleNamespace(rows=rows, lengths=[11, 11, 6], batch=2, files=files)
    counts = [[4, 2], [4, 0], [3, 1]]
    answers = [{"kept": {"entering": n}} for n in counts]
    assert rate._padding(bench, answers) == pytest.approx((2 * (14 + 12) + 8 + 6) / (14 + 12 + 14 + 10 + 8 + 6) - 1)


def test_arms_take_turns(monkeypatch: Any, tmp_path: Path) -> None:
    """Every arm runs once in a short first round and once in each timed round."""
    seen: list[tuple[str, int | None]] = []

    def seconds(self: Any, arm: rate.Arm, limit: int | None) -> float:
        seen.append((arm.label, limit))
        self.texts[arm.label], self.batch[arm.label] = ["yes"] * 400, arm.batch or 1
        return 2.0 if arm.method else 8.0

    monkeypatch.setattr(rate.Rate, "seconds", seconds)
    weight = torch.nn.Linear(1, 1)
    loaded = type("Loaded", (), {"model": weight})()
    found = rate.measure(Settings(), [rate.Arm("full", 8), rate.Arm("")], 2, loaded)
    assert seen == [("full, batch 8", 8), (rate.LOADER, 8)] + [("full, batch 8", None), (rate.LOADER, None)] * 2
    assert found["rows"][0]["per_second"]["median"] == 200 and found["rows"][0]["times_llava"]["q1"] == 4


def test_refused(capsys: Any) -> None:
    assert rate.main(["--model", "no/such/model/here"]) == 1
    assert "no such checkpoint" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        rate.main(["--repeats", "0"])
    assert "must be a positive integer" in capsys.readouterr().err


def test_batches() -> None:
    import argparse

    assert rate._batches("1,8,auto") == [1, 8, None]
    for text in ("", "0", "a", "1,-2"):
        with pytest.raises(argparse.ArgumentTypeError, match="batch size"):
            rate._batches(text)


def test_one_by_one(tmp_path: Path) -> None:
    """The loop runs without package llava, gives the answers of the other arms, and reports every timed round."""
    out, seen = tmp_path / "rate.json", []
    args = ["--limit", "2", "--batch", "2", "--method", "full", "--repeats", "1", "--dtype", "float32", "--no-llava"]
    assert rate.main([*args, "--loop", "--max-new-tokens", "2", "--out", str(out)]) == 0
    ours, loop = json.loads(out.read_text())["rows"]
    assert (loop["arm"], loop["method"], loop["tokens"], loop["batch"]) == (rate.LOOP, None, None, 1)
    assert ours["same_answers"] == {"first": 1.0, "loop": 1.0} and loop["times_loop"]["median"] == 1
    assert ours["times_loop"]["median"] == pytest.approx(ours["per_second"]["median"] / loop["per_second"]["median"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate.Rate, "seconds", lambda self, arm, limit: self.__dict__.update(
            texts={rate.LOOP: ["a"]}, batch={rate.LOOP: 1}) or 2.0)  # fmt: skip
        loaded = type("Loaded", (), {"model": torch.nn.Linear(1, 1)})()
        rate.measure(Settings(limit=1), [rate.Arm(rate.LOOP)], 2, loaded, lambda *given: seen.append(given))
    assert seen == [(rate.LOOP, 2.0)] * 2


def test_the_loop_refuses_crops() -> None:
    from llava_prune.eval.loop import ask_one_by_one

    files: Any = SimpleNamespace(questions=[SimpleNamespace(image="a")])
    with pytest.raises(ValueError, match="sees images whole"):
        ask_one_by_one(SimpleNamespace(crops=5), files, rate.protocol_of(rate.TINY), Path("none"), 1)
