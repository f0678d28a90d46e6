"""ScienceQA: accuracy over all questions and over those with an image, as in LLaVA's eval_science_qa.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stats import share
from ..prompt import IMAGE_MARK
from ..reading import check_answers, read_json, read_text, shown
from ..reading import read_answers as read_lines
from ..resample import Units, mean_units, scores_of
from ..task import Question, QuestionScores, Sources

LETTERS = "ABCDE"
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class Label:
    """The right answer of a question: its index, and the number of options."""

    answer: int
    options: int


def letter(text: str) -> str:
    """Return the letter of an answer: the bare letter, "A. ...", or "The answer is A." exactly once; else FAILED."""
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def _conversations(path: Path) -> list[tuple[str, str | None, str, str]]:
    """Return (id, image, text of the human turn, letter) of each row of the question file."""
    out = []
    for number, row in enumerate(read_json(path, list), 1):
        try:
            (_, human), (_, gpt) = ((t["from"], t["value"]) for t in row["conversations"][:2])
            item = (row["id"], row.get("image"), human, gpt)
            if not all(isinstance(v, str) for v in (item[0], human, gpt)) or not isinstance(item[1], str | None):
                raise TypeError("a field is not a string")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}, row {number}: needs an id and conversations ({error!r})") from error
        out.append(item)
    if not out:
        raise ValueError(f"{path} has no rows")
    return out


def read_questions(sources: Sources) -> list[Question]:
    """Read the question file (llava_test_CQM-A.json); text-only rows have no image.

    Source: llava/eval/model_vqa_science.py with --single-pred-prompt.

    Raises:
        ValueError: for broken rows or a repeated id.
    """
    path = sources.path("questions")
    out = []
    for key, image, human, _ in _conversations(path):
        text = sources.task.complete(human.replace(IMAGE_MARK, "").strip())
        out.append(Question(key, image, text, f"{IMAGE_MARK}\n{text}" if image else text))
    if len({q.id for q in out}) < len(out):
        raise ValueError(f"{path}: an id is repeated; fetch the file again")
    sources.note("questions", path, "questions", rows=len(out))
    return out


def _options(human: str) -> int:
    """Count the options at the end of a question."""
    lines, count = human.split("\n"), 0
    starts = [i for i, line in enumerate(lines) if line.startswith("A. ")]
    for line in lines[starts[-1] :] if starts else []:
        if count < len(LETTERS) and line.startswith(f"{LETTERS[count]}. "):
            count += 1
    return count


def load_labels(sources: Sources) -> dict[str, Label]:
    """Read the labels of the test split: question id -> label, in order.

    They are read from problems.json, with the split from pid_splits.json if it exists, or else from the question file.

    Raises:
        ValueError: for broken files, or a question without a label.
    """
    path = sources.find("annotations") or sources.path("questions")
    if path.suffix == ".jsonl" or read_text(path).lstrip()[:1] == "[":
        rows = _conversations(path)
        sources.note("questions", path, "questions", rows=len(rows))
        return {key: Label(LETTERS.find(gpt.strip()[:1] or "?"), _options(human)) for key, _, human, gpt in rows}
    problems, labels = read_json(path), {}
    split = sources.find("splits")
    ids = [k for k, p in problems.items() if isinstance(p, dict) and p.get("split", "test") == "test"]
    if split is not None:
        ids = read_json(split).get("test")
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise ValueError(f"{split}: no list of ids named 'test'; fetch the file again")
        sources.note("splits", split, "splits", rows=len(ids))
    for key in ids:
        try:
            labels[key] = Label(int(problems[key]["answer"]), len(problems[key]["choices"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: question {key!r} lacks 'answer' or 'choices'; fetch the file again") from error
    sources.note("annotations", path, "annotations", rows=len(problems))
    return labels


def unknown(labels: Mapping[str, Label], asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions that have no label."""
    return [str(q.id) for q in asked if str(q.id) not in labels]


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read answers in LLaVA's format, or the output of LLaVA's own scorer (an object with correct and incorrect).

    Raises:
        ValueError: for anything else.
    """
    try:
        whole = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        return read_lines(path)
    if not isinstance(whole, dict) or not {"correct", "incorrect"} <= set(whole):
        return read_lines(path)
    try:
        given = [*whole["correct"], *whole["incorrect"]]
        rows = [{"question_id": r["question_id"], "prompt": r["question"], "text": r["pred"]} for r in given]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a row lacks 'question_id', 'question' or 'pred'; fetch the file again") from error
    check_answers(path, rows)
    return [r for r in rows if (r["prompt"], r["text"]) != ("Unknown", FAILED)]


def _right(text: str, label: Label) -> bool:
    """Return whether an answer has the right letter; a letter beyond the options of the question is wrong."""
    choice = letter(text)
    return choice in LETTERS[: label.options] and LETTERS.find(choice) == label.answer


def _questions(answers: Sequence[Mapping[str, Any]], labels: Mapping[str, Label], ids: Sequence[str]) -> QuestionScores:
    """Return (score, "image" or "text") of each answer row; the score is None if the question is not scored."""
    wanted = set(ids)
    out: QuestionScores = []
    for row in answers:
        key = str(row["question_id"])
        right = float(_right(row["text"], labels[key])) if key in wanted else None
        out.append((right, "image" if IMAGE_MARK in row.get("prompt", "") else "text"))
    return out


def units(answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> Units:
    """Return the units of the bootstrap: every question with an image is a unit."""
    return mean_units(scores_of([row for row in scores if row["type"] == "image"]))


def score(
    answers: Iterable[Mapping[str, Any]], labels: Mapping[str, Label], asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute the accuracy over all questions and IMG-Accuracy in percent.

    A question without an answer is wrong in the former and absent from the latter. Whether a question has an image is
    decided by the stored prompt. Both are LLaVA's rules.

    Args:
        answers: rows with `question_id`, `prompt` and `text`; the last row of a repeated id counts.
        labels: labels, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None for all.

    Returns:
        figure (IMG-Accuracy), rows, details (overall, image, text), scores of questions with an image, and questions
        ((score, "image" or "text") of each answer row).

    Raises:
        ValueError: if there is nothing to score.
    """
    answers = list(answers)
    given = {str(a["question_id"]): a for a in answers}
    ids = list(labels) if asked is None else [str(q.id) for q in asked if str(q.id) in labels]
    if not any(k in given for k in ids):
        raise ValueError("the answers and the test split have no question id in common; give files of one split")
    correct, seen = {}, {}
    for key in ids:
        row = given.get(key)
        correct[key] = row is not None and _right(row["text"], labels[key])
        seen[key] = row is not None and IMAGE_MARK in row.get("prompt", "")
    missing = [k for k in ids if k not in given]
    image = share([correct[k] for k in ids if seen[k]])
    details = {
        "overall": share(list(correct.values())),
        "image": image,
        "text": share([correct[k] for k in ids if not seen[k] and k in given]),
        "missing": len(missing),
        "answers_without_question": sum(k not in labels for k in given),
    }
    why = None if image["rows"] else "no stored prompt holds <image>, so there is no IMG-Accuracy"
    scores = {k: correct[k] for k in ids if seen[k]}
    out = {"figure": image["accuracy"], "rows": len(ids), "details": details, "scores": scores, "why": why}
    if missing:
        details["missing_ids"] = shown(missing)
    return {**out, "questions": _questions(answers, labels, ids)}
