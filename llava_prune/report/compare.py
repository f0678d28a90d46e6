"""Compare two runs of one benchmark question by question; only their files are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..stats import mcnemar, paired_difference
from .store import ANSWERS, SCORES, StoredRun

IMAGE_LINE = "<image>"
"""Line of a stored prompt that stands for the image."""


@dataclass(frozen=True)
class Pair:
    """A question with its answers in run A and run B.

    Attributes:
        question_id: id in the question file.
        type: group of questions, see `StoredRun.scores`.
        prompt: the question, without the line of the image and without the instruction that all questions share.
        answer_a: answer of run A.
        answer_b: answer of run B.
        score_a: score of run A, 0..1.
        score_b: score of run B, 0..1.
    """

    question_id: str | int
    type: str | None
    prompt: str
    answer_a: str
    answer_b: str
    score_a: float
    score_b: float


@dataclass(frozen=True)
class Counts:
    """Counts of questions by the scores of run A and run B. The five counts add up to `questions`.

    Attributes:
        questions: questions with a score in both runs.
        both: questions with score 1 in both runs.
        only_a: questions with a higher score in A; if scores are 0 or 1, right in A only.
        only_b: questions with a higher score in B; if scores are 0 or 1, right in B only.
        neither: questions with score 0 in both runs.
        partly: questions with the same partial credit in both runs, between 0 and 1.
        difference: points, low and high: mean score of B minus that of A in percent, with its paired 95 % interval.
    """

    questions: int
    both: int
    only_a: int
    only_b: int
    neither: int
    partly: int
    difference: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        bench: the benchmark.
        a: facts of run A, see `StoredRun.row`.
        b: facts of run B.
        total: counts over all questions.
        p_value: p-value of the exact two-sided McNemar test on the flips.
        by_type: counts for each type of question, sorted by type; empty if questions have no type.
        reworded: number of questions whose answers differ in text but not in score.
        unscored: number of questions without a score in one of the runs, which are left out.
        flips: questions with different scores, in question order.
    """

    bench: str
    a: dict[str, Any]
    b: dict[str, Any]
    total: Counts
    p_value: float
    by_type: dict[str, Counts]
    reworded: int
    unscored: int
    flips: list[Pair]


def compare(a: StoredRun, b: StoredRun) -> Comparison:
    """Compare two runs on the same questions, row by row.

    A flip is a question with different scores. Only the sign of the difference counts: a difference in partial credit
    is a flip just as one between right and wrong. McNemar's test assumes independent questions. Several questions about
    one image, or the rotations of an MMBench question, are not independent, so the p-value may be too small.

    Args:
        a: the baseline, for example the unpruned run.
        b: the other run.

    Returns:
        Counts, p-value and flips. Differences are differences of mean scores, B minus A. The mean score need not be the
        benchmark's figure: POPE's figure is an F1, MME's a sum, and MMBench's a circular accuracy.

    Raises:
        ValueError: for runs of two benchmarks or of different questions, missing or broken files, or if no question has
            a score in both runs.
    """
    if a.bench != b.bench:
        raise ValueError(f"{a.folder} is a run of {a.bench} and {b.folder} of {b.bench}; give two of one benchmark")
    answers = [a.answers(), b.answers()]
    check_same(a, b, *answers)
    scores = [scored(run, rows) for run, rows in zip((a, b), answers, strict=True)]
    prompts = questions([row["prompt"] for row in answers[0]])
    pairs = [
        Pair(x["question_id"], s["type"], prompt, x["text"], y["text"], s["score"], t["score"])
        for x, y, s, t, prompt in zip(*answers, *scores, prompts, strict=True)
        if s["score"] is not None and t["score"] is not None
    ]
    if not pairs:
        raise ValueError(
            f"no question has a score in both {a.folder} and {b.folder}; the benchmark has no labels there"
        )
    total = _count(pairs)
    by_type = {name: [p for p in pairs if p.type == name] for name in sorted({p.type for p in pairs if p.type})}
    return Comparison(
        bench=a.bench,
        a=a.row(),
        b=b.row(),
        total=total,
        p_value=mcnemar(total.only_a, total.only_b),
        by_type={name: _count(group) for name, group in by_type.items()},
        reworded=sum(p.answer_a != p.answer_b and p.score_a == p.score_b for p in pairs),
        unscored=len(answers[0]) - len(pairs),
        flips=[p for p in pairs if p.score_a != p.score_b],
    )


def _count(pairs: Sequence[Pair]) -> Counts:
    both, neither = (sum(p.score_a == p.score_b == score for p in pairs) for score in (1, 0))
    only_a, only_b = sum(p.score_a > p.score_b for p in pairs), sum(p.score_a < p.score_b for p in pairs)
    partly = len(pairs) - both - neither - only_a - only_b
    gap = paired_difference([p.score_b for p in pairs], [p.score_a for p in pairs])
    points = dict(zip(("points", "low", "high"), (100 * v for v in gap), strict=True))
    return Counts(len(pairs), both, only_a, only_b, neither, partly, points)


def check_same(a: StoredRun, b: StoredRun, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Refuse runs that asked different questions, or were scored with different labels.

    Args:
        a, b: the runs.
        ours, theirs: rows of their answer files.

    Raises:
        ValueError: naming the first difference, or a row that is not an answer.
    """
    for run, rows in ((a, ours), (b, theirs)):
        for number, row in enumerate(rows, 1):
            texts = isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)
            if not texts or not isinstance(row.get("question_id"), (str, int)):
                raise ValueError(f"{run.folder / ANSWERS}, line {number}: needs question_id, prompt and text")
    start = f"{a.folder} and {b.folder} asked different questions"
    for number, (x, y) in enumerate(zip(ours, theirs, strict=False), 1):
        for name in ("question_id", "prompt"):
            if x[name] != y[name]:
                raise ValueError(f"{start}: line {number} has {name} {x[name]!r:.100} and {y[name]!r:.100}")
    if len(ours) != len(theirs):
        raise ValueError(f"{start}: {len(ours)} and {len(theirs)}; give two runs with the same --limit")
    if not a.same_labels(b):
        raise ValueError(
            f"{a.folder} and {b.folder} were scored with different label files; run both evaluations again, which "
            "scores the answers anew and asks nothing"
        )


def scored(run: StoredRun, answers: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the score rows of a run's answers.

    Raises:
        ValueError: for scores of other answers, or rows without a valid score and type.
    """
    rows = run.scores()
    if [r.get("question_id") for r in rows] != [r["question_id"] for r in answers]:
        raise ValueError(f"{run.folder / SCORES} is not of the answers beside it; run the evaluation again")
    for number, row in enumerate(rows, 1):
        score, kind = row.get("score", ""), row.get("type", 0)
        valid = score is None or (isinstance(score, (int, float)) and 0 <= score <= 1)
        if not valid or not isinstance(kind, (str, type(None))):
            raise ValueError(f"{run.folder / SCORES}, line {number}: needs score, null or in 0..1, and type")
    return rows


def questions(prompts: Sequence[str]) -> list[str]:
    """Return the questions in stored prompts.

    The line of the image is left out, and so is the last line if all prompts share it.
    """
    lines = [[x for x in p.split("\n") if x.strip() and x.strip() != IMAGE_LINE] for p in prompts]
    shared = {x[-1] if x else "" for x in lines}
    instruction = shared.pop() if len(shared) == 1 and len(prompts) > 1 else None
    return ["\n".join(x[:-1] if len(x) > 1 and x[-1] == instruction else x) for x in lines]
