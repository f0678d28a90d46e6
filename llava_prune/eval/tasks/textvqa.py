"""TextVQA: soft accuracy over ten annotators, as in LLaVA's eval_textvqa.py and m4c_evaluator.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...stats import average
from ..reading import read_json, shown, unanswered
from ..task import Question, Sources
from ..task import read_questions as read_lines
from ..vqa import m4c

ANNOTATORS = 10
Key = tuple[str, str]


def read_questions(sources: Sources) -> list[Question]:
    """Read the question file. Ids are those of images and may be repeated."""
    return read_lines(sources, unique=False)


def question_of(prompt: str) -> str | None:
    """Return the question in a stored prompt, in lower case; None for a prompt of another format."""
    if prompt.startswith("OCR tokens: "):
        _, mark, rest = prompt.partition("Question: ")
        question, end, _ = rest.partition(" Short answer:")
        return question.lower() if mark and end else None
    lines = prompt.split("\n")
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return (lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]).lower()
    return lines[0].lower() if len(lines) == 2 else None


def answer_scores(references: Sequence[str]) -> dict[str, float]:
    """Return the score of each distinct reference: mean over annotators of min(1, other annotators with it / 3)."""
    said = [m4c(r) for r in references]
    counts = Counter(said)
    return {u: sum(min(1.0, (m - (other == u)) / 3) for other in said) / len(said) for u, m in counts.items()}


def load_labels(sources: Sources) -> dict[Key, list[str]]:
    """Read the annotations: (image id, question in lower case) -> ten references.

    Raises:
        ValueError: for broken files or another number of annotators.
    """
    path = sources.path("annotations")
    labels: dict[Key, list[str]] = {}
    data = read_json(path).get("data")
    if not isinstance(data, list):
        raise ValueError(f"{path}: no list named 'data'; fetch the file again")
    for number, row in enumerate(data, 1):
        try:
            key, references = (str(row["image_id"]), row["question"].lower()), row["answers"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, question {number}: no image_id, question or answers") from error
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise ValueError(f"{path}, question {number}: answers must be a list of strings")
        if len(references) != ANNOTATORS:
            raise ValueError(f"{path}, question {number}: {len(references)} answers, the score needs {ANNOTATORS}")
        labels[key] = references
    sources.note("annotations", path, "annotations", rows=len(data))
    return labels


def _key(row: Mapping[str, Any]) -> Key:
    question = question_of(row.get("prompt", ""))
    if question is None:
        raise ValueError(
            f"question_id {row['question_id']!r}: no question in the prompt {row.get('prompt', '')[:80]!r}; it needs "
            "the question, an OCR line and the instruction, as in LLaVA's question file"
        )
    return str(row["question_id"]), question


def unknown(labels: Mapping[Key, Any], asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions that have no label."""
    return [str(q.id) for q in asked if _key({"question_id": q.id, "prompt": q.stored}) not in labels]


def score(
    answers: Iterable[Mapping[str, Any]], labels: Mapping[Key, list[str]], asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute the accuracy in percent.

    Args:
        answers: rows with `question_id`, `prompt` and `text`, one for each question.
        labels: annotations, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None for all.

    Returns:
        figure, rows, details, scores by row, and questions ((score, None) of each answer row).

    Raises:
        ValueError: for prompts without a question, and questions that are unknown, missing or answered twice.
    """
    rows = [(_key(a), a["text"]) for a in answers]
    wanted = list(labels) if asked is None else [_key({"question_id": q.id, "prompt": q.stored}) for q in asked]
    strange = [k for k, _ in rows if k not in labels]
    if strange:
        raise ValueError(
            f"{len(strange)} answers have no annotation ({shown(strange)}); give the annotations of the same questions"
        )
    given, due = Counter(k for k, _ in rows), Counter(wanted)
    missing = [k for k in due if k not in given]
    twice = [k for k, n in given.items() if n > max(1, due[k])]
    if missing:
        raise ValueError(unanswered(missing, len(due)))
    if twice:
        raise ValueError(f"{len(twice)} questions are answered more than once ({shown(twice)}); keep one answer each")
    tables = {k: answer_scores(labels[k]) for k in due}
    each = [tables[k].get(m4c(text), 0.0) if k in due else None for k, text in rows]
    scores = {str(i): s for i, s in enumerate(s for s in each if s is not None)}
    overall = average(list(scores.values()))
    out = {"figure": overall["accuracy"], "rows": len(scores), "details": {"overall": overall}, "scores": scores}
    return {**out, "questions": [(s, None) for s in each]}
