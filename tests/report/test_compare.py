"""Comparison of two runs, question by question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_prune.report.compare import Comparison, compare
from llava_prune.report.store import find_run
from llava_prune.stats import mcnemar, paired_difference

QUESTIONS = ["What?", "Is it?", "How many?", "Which side?", "Who?", "Where?"]
ONE = [("red", 1.0), ("yes", 1.0), ("2", 1.0), ("left", 0.0), ("cat", 0.0), ("x", None)]
TWO = [("red", 1.0), ("no", 0.0), ("3", 0.0), ("right", 1.0), ("dog", 0.0), ("y", 1.0)]


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 0.0625),
        (5, 0, 0.0625),
        (10, 2, 0.03857421875),
        (1, 0, 1.0),
        (3, 3, 1.0),  # twice the tail is more than 1
        (0, 1, 1.0),
        (8, 1, 0.0390625),
    ],
)
def test_mcnemar(a: int, b: int, p: float) -> None:
    assert mcnemar(a, b) == p


def test_mcnemar_of_many_flips() -> None:
    """The exact test approaches the normal approximation and does not overflow."""
    assert mcnemar(5_000, 5_200) == pytest.approx(0.0487, abs=5e-4)  # 2 (1 - Phi(199 / sqrt(10,200)))
    assert mcnemar(20_000, 0) == 0.0
    with pytest.raises(ValueError, match="must not be negative"):
        mcnemar(-1, 2)


def asked(
    answers: list[tuple[str, float | None]], questions: list[str] = QUESTIONS
) -> list[tuple[str, str, float | None]]:
    return [(q, text, score) for q, (text, score) in zip(questions, answers, strict=True)]


def compared(folder: Path) -> Comparison:
    return compare(find_run("a", [folder]), find_run("b", [folder]))


def test_flips(tmp_path: Path, runs: Callable[..., Path]) -> None:
    runs(tmp_path / "a", asked(ONE))
    runs(tmp_path / "b", asked(TWO), method="autoprune", tokens=64)
    got = compared(tmp_path)
    t = got.total
    assert (t.questions, t.both, t.only_a, t.only_b, t.neither, t.partly) == (5, 1, 2, 1, 1, 0)
    assert got.unscored == 1 and got.reworded == 1  # cat and dog
    assert got.p_value == 1.0
    assert list(t.difference.values()) == pytest.approx(
        [100 * v for v in paired_difference([1, 0, 0, 1, 0], [1, 1, 1, 0, 0])]
    )
    assert t.difference["points"] == pytest.approx(-20)
    assert [(f.question_id, f.type, f.prompt, f.answer_a, f.answer_b, f.score_a, f.score_b) for f in got.flips] == [
        ("1", "verify", "Is it?", "yes", "no", 1, 0),
        ("2", "query", "How many?", "2", "3", 1, 0),
        ("3", "verify", "Which side?", "left", "right", 0, 1),
    ]
    query, verify = got.by_type["query"], got.by_type["verify"]
    assert list(got.by_type) == ["query", "verify"]
    assert (query.questions, query.both, query.only_a, query.only_b, query.neither) == (3, 1, 1, 0, 1)
    assert (verify.questions, verify.both, verify.only_a, verify.only_b, verify.neither) == (2, 0, 1, 1, 0)
    assert got.a["label"] == "full" and got.b["tokens"] == 64
    other = compare(find_run("b", [tmp_path]), find_run("a", [tmp_path]))
    assert (other.total.only_a, other.total.only_b) == (1, 2) and other.total.difference["points"] == pytest.approx(20)


def test_partial_credit(tmp_path: Path, runs: Callable[..., Path]) -> None:
    """A flip is a difference of any size; equal partial credit is neither right nor wrong."""
    first = [("a", 0.3), ("a", 0.3), ("a", 1.0), ("a", 0.0), ("a", 0.9), ("a", 1.0)]
    second = [("a", 0.3), ("b", 0.6), ("b", 0.9), ("b", 0.3), ("b", 0.9), ("a", 1.0)]
    runs(tmp_path / "a", asked(first), kinds=[None])
    runs(tmp_path / "b", asked(second), kinds=[None])
    got = compared(tmp_path)
    t = got.total
    assert (t.both, t.only_a, t.only_b, t.neither, t.partly) == (1, 1, 2, 0, 2)
    assert got.p_value == mcnemar(1, 2) and got.by_type == {} and got.reworded == 1
    assert t.difference["points"] == pytest.approx(100 * (0.3 - 0.1 + 0.3) / 6)
    assert [f.score_b for f in got.flips] == [0.6, 0.9, 0.3]


def test_a_run_with_itself(tmp_path: Path, runs: Callable[..., Path]) -> None:
    runs(tmp_path / "a", asked(ONE))
    got = compare(*(find_run("a", [tmp_path]) for _ in range(2)))
    assert got.flips == [] and got.p_value == 1.0 and got.reworded == 0 and got.total.difference["points"] == 0


@pytest.mark.parametrize(
    ("prompts", "questions"),
    [
        (["<image>\nA?\nB\nShort.", "<image>\nC?\nShort."], ["A?\nB", "C?"]),
        (["A?\nShort.", "C?\nLong."], ["A?\nShort.", "C?\nLong."]),  # no common instruction
        (["A?\nShort."], ["A?\nShort."]),
        (["Short.", "C?\nShort."], ["Short.", "C?"]),
    ],
)
def test_the_question_in_a_prompt(
    tmp_path: Path, runs: Callable[..., Path], prompts: list[str], questions: list[str]
) -> None:
    for name, score in (("a", 0.0), ("b", 1.0)):
        folder = runs(tmp_path / name, [("", "x", score)] * len(prompts))
        edit(folder, "answers.jsonl", lambda rows: [{**r, "prompt": p} for r, p in zip(rows, prompts, strict=True)])
    assert [f.prompt for f in compared(tmp_path).flips] == questions


def edit(folder: Path, name: str, change: Callable[[list[dict]], list[dict]]) -> None:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in change(rows)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("answers.jsonl", lambda rows: [rows[0], {**rows[1], "prompt": "Else?"}, *rows[2:]],
         "a and .*b asked different questions: line 2 has prompt 'Is it.* and 'Else"),
        ("answers.jsonl", lambda rows: rows[:-1], "different questions: 6 and 5; .* same --limit"),
        ("answers.jsonl", lambda rows: [*rows[:2], {"question_id": "2"}, *rows[3:]], "line 3: needs question_id"),
        ("answers.jsonl", lambda rows: [{**r, "question_id": f"x{r['question_id']}"} for r in rows],
         "line 1 has question_id '0' and 'x0'"),
        ("scores.jsonl", lambda rows: rows[1:], "is not of the answers beside it; run the evaluation again"),
        ("scores.jsonl", lambda rows: [{**r, "score": 1.5} for r in rows], "line 1: needs score, null or in 0..1"),
        ("scores.jsonl", lambda rows: [{**r, "score": "1"} for r in rows], "line 1: needs score, null or in 0..1"),
        ("scores.jsonl", lambda rows: [{"question_id": r["question_id"]} for r in rows], "line 1: needs score"),
        ("scores.jsonl", lambda rows: [{**r, "score": None} for r in rows], "no question has a score in both"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, runs: Callable[..., Path], name: str, change: Any, message: str) -> None:
    runs(tmp_path / "a", asked(ONE))
    edit(runs(tmp_path / "b", asked(TWO)), name, change)
    with pytest.raises(ValueError, match=message) as error:
        compared(tmp_path)
    assert "\n" not in str(error.value)


def test_runs_that_were_scored_with_different_labels(tmp_path: Path, runs: Callable[..., Path]) -> None:
    def files(questions: str, labels: str) -> dict[str, Any]:
        return {"questions": {"sha256": questions}, "annotations": {"sha256": labels}}

    runs(tmp_path / "a", asked(ONE), files=files("1", "2"))
    runs(tmp_path / "b", asked(TWO), files=files("3", "2"))
    assert compared(tmp_path).total.questions == 5
    runs(tmp_path / "c", asked(TWO), files=files("1", "4"))
    with pytest.raises(ValueError, match="were scored with different label files; run both evaluations again"):
        compare(find_run("a", [tmp_path]), find_run("c", [tmp_path]))


def test_two_benchmarks(tmp_path: Path, runs: Callable[..., Path]) -> None:
    runs(tmp_path / "a", asked(ONE))
    runs(tmp_path / "b", asked(ONE), bench="pope")
    with pytest.raises(ValueError, match="is a run of gqa and .* of pope; give two of one benchmark"):
        compared(tmp_path)
