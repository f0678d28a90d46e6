"""Scorers return a score and a type for every answer row, in the order of the rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from llava_prune.eval.task import Question, QuestionScores, Sources, Task, load_task, questions_of
from llava_prune.eval.tasks import mme, pope, textvqa

DATA = Path(__file__).resolve().parents[2] / "playground" / "data" / "mini"
NAMES = ("gqa", "mmbench", "mmbench_cn", "mme", "ocrbench", "pope", "sqa", "textvqa", "vqav2")


def _mme(labels: Any, q: Question) -> str:
    return labels[mme._known(mme._key({"question_id": q.id}, q.stored), labels)]


def _pope(labels: Any, q: Question) -> str:
    return "yes" if pope._gold(labels.split[str(q.id)], labels, True)[str(q.id)] else "no"


def _textvqa(labels: Any, q: Question) -> str:
    return labels[str(q.id), textvqa.question_of(q.stored)][0]


RIGHT: dict[str, Callable[[Any, Question], str]] = {
    "gqa": lambda labels, q: labels[q.id]["answer"],
    "mmbench": lambda labels, q: labels[str(q.id)]["answer"],
    "mmbench_cn": lambda labels, q: labels[str(q.id)]["answer"],
    "mme": _mme,
    "ocrbench": lambda labels, q: "".join(next(r["answers"] for r in labels if r["id"] == q.id)),
    "pope": _pope,
    "sqa": lambda labels, q: "ABCDE"[labels[q.id].answer],
    "textvqa": _textvqa,
    "vqav2": lambda labels, q: labels.annotations[str(q.id)]["references"][0],
}
"""Benchmark -> function of labels and a question that returns a right answer."""


class Made:
    """A benchmark of playground/data/mini with made-up answers, of which two in three are right."""

    def __init__(self, name: str) -> None:
        self.task: Task = load_task(name)
        sources = Sources(self.task, DATA)
        self.questions = questions_of(sources)
        self.labels = self.task.scorer.load_labels(sources)
        if name == "ocrbench":
            assert len({q.id for q in self.questions}) == len(self.questions)
        rows = enumerate(self.questions)
        self.right = [i % 3 > 0 for i, _ in enumerate(self.questions)]
        self.answers = [
            {"question_id": q.id, "prompt": q.stored, "text": RIGHT[name](self.labels, q) if i % 3 else self.wrong(q)}
            for i, q in rows
        ]

    def wrong(self, q: Question) -> str:
        """Return the wrong one of yes and no, or a text that is wrong for every question."""
        if self.task.name not in ("pope", "mme"):
            return "@"
        return "no" if RIGHT[self.task.name](self.labels, q).lower() == "yes" else "yes"

    def score(self, answers: list[dict[str, Any]] | None = None, asked: Any = None) -> dict[str, Any]:
        """Return the scorer's result for some answers; for all by default."""
        return self.task.scorer.score(self.answers if answers is None else answers, self.labels, asked)


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


def by_type(questions: QuestionScores) -> dict[str | None, float]:
    """Return the mean score of each type."""
    groups: dict[str | None, list[float]] = defaultdict(list)
    for value, kind in questions:
        assert value is not None
        groups[kind].append(value)
    return {kind: fmean(values) for kind, values in groups.items()}


def test_scores_are_those_of_the_rows(made: Made) -> None:
    got = made.score(iter(made.answers))  # type: ignore[arg-type]
    values = [value for value, _ in got["questions"]]
    assert len(values) == len(made.answers) and all(type(v) is float for v in values)
    if made.task.name in ("textvqa", "vqav2"):  # annotators need not agree
        assert [v > 0 for v in values] == made.right and max(values) == 1
    else:
        assert [v == 1 for v in values] == made.right and set(values) == {0, 1}
    for at in (1, len(values) - 1):  # one answer changes one score
        texts = [{**a, "text": made.wrong(made.questions[at])} if i == at else a for i, a in enumerate(made.answers)]
        changed = made.score(texts)["questions"]
        assert changed == [(0.0, kind) if i == at else (v, kind) for i, (v, kind) in enumerate(got["questions"])]


def test_the_mean_is_the_figure(made: Made) -> None:
    got = made.score()
    figure, details, kinds = got["figure"], got["details"], by_type(got["questions"])
    mean = fmean(v for v, _ in got["questions"])
    match made.task.name:
        case "gqa":
            assert figure == pytest.approx(100 * mean)
            assert kinds == pytest.approx({k: t["accuracy"] / 100 for k, t in details["structural"].items()})
        case "sqa":
            assert figure == pytest.approx(100 * kinds["image"])
            assert details["text"]["accuracy"] == pytest.approx(100 * kinds["text"])
        case "textvqa":
            assert figure == pytest.approx(100 * mean) and set(kinds) == {None}
        case "vqav2":
            assert figure == pytest.approx(100 * mean)
            assert kinds == pytest.approx({k: t["accuracy"] / 100 for k, t in details["by_answer_type"].items()})
        case "ocrbench":
            assert figure == sum(v for v, _ in got["questions"])
            assert kinds == pytest.approx({k: t["right"] / t["rows"] for k, t in details["types"].items()})
        case "pope":
            assert kinds == pytest.approx({k: details[k]["accuracy"] for k in ("adversarial", "random", "popular")})
        case "mme":
            assert kinds == pytest.approx({k: t["acc"] for k, t in details["tasks"].items()})
        case _:
            assert 100 * mean == pytest.approx(details["rows"]["accuracy"])
            assert set(kinds) == set(details["category"])


@pytest.mark.parametrize("name", ["gqa", "mmbench", "ocrbench", "sqa", "textvqa", "vqav2"])
def test_rows_in_another_order(name: str) -> None:
    """Scorers that join answers and labels by id return scores in the order of the answers."""
    made = Made(name)
    assert made.score(made.answers[::-1])["questions"] == made.score()["questions"][::-1]


@pytest.mark.parametrize("name", ["gqa", "mmbench", "mme", "pope", "sqa", "textvqa"])
def test_rows_that_do_not_count(name: str) -> None:
    """Answers to questions that are not asked have a type and no score."""
    made = Made(name)
    n = 120 if name == "pope" else 4  # a whole split of POPE
    whole, part = made.score()["questions"], made.score(asked=made.questions[:n])["questions"]
    assert part[:n] == whole[:n] and part[n:] == [(None, kind) for _, kind in whole[n:]]


def test_the_second_question_of_an_image_is_needed() -> None:
    """MME scores pairs of questions, so the last of three questions has no score."""
    made = Made("mme")
    assert [v is None for v, _ in made.score(made.answers[:3], made.questions[:3])["questions"]] == [False, False, True]


def test_rows_without_labels() -> None:
    made = Made("mmbench")
    labels = {k: {**row, "answer": None} for k, row in made.labels.items()}
    got = made.task.scorer.score(made.answers, labels)
    assert got["figure"] is None
    assert got["questions"] == [(None, labels[str(a["question_id"])]["category"]) for a in made.answers]
    made = Made("vqav2")
    got = made.task.scorer.score(made.answers, type(made.labels)(None, None))
    assert got["figure"] is None and got["questions"] == [(None, None)] * len(made.answers)


def test_repeated_answers() -> None:
    """The last row of an id counts in the figure; every row has the score of its own text."""
    made = Made("gqa")
    got = made.score([{**made.answers[1], "text": "@"}, *made.answers])
    assert got["figure"] == made.score()["figure"]
    assert got["questions"] == [(0.0, made.score()["questions"][1][1]), *made.score()["questions"]]
