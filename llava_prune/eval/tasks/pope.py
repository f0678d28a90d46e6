"""POPE: F1 of each split, as in LLaVA's eval_pope.py, and the mean over the splits.

The official script joins answers and labels by their order alone. This module compares the images and texts of both, so
that a shifted, mixed or foreign file is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..reading import WAY_OUT, read_jsonl, shown
from ..resample import Array, Units
from ..task import Question, QuestionScores, Sources

SPLITS = ("adversarial", "random", "popular")
_PREFIX = "coco_pope_"
_HINT = "LLaVA's question file belongs to the labels of commit e3e3926 (random: 2910 rows; later commits have 3000)"


@dataclass(frozen=True)
class Labels:
    """Labels of the three splits.

    Attributes:
        rows: split -> label rows in order.
        questions: split -> rows of the question file in order.
        split: question id -> split.
    """

    rows: dict[str, list[dict[str, Any]]]
    questions: dict[str, list[dict[str, Any]]]
    split: dict[str, str]


def says_yes(text: str) -> bool:
    """Return whether an answer means "yes" by the official rule.

    The rule reads the text before the first dot: the answer is "no" if one of its words is No, no or not, and otherwise
    "yes".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(w in ("No", "no", "not") for w in words)


def _label_file(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path, ("image", "text", "label"))
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no") or not isinstance(row["text"], str):
            raise ValueError(f"{path}, row {number}: label must be yes or no, found {row['label']!r}")
    return rows


def load_labels(sources: Sources) -> Labels:
    """Read the labels of every split, and the order of the question file.

    Raises:
        ValueError: for broken files, other files in the folder, or repeated question ids.
    """
    folder = sources.path("annotations")
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
    names = [p.stem.removeprefix(_PREFIX) for p in files if p.name.startswith(_PREFIX)]
    if len(names) < len(files) or not names:
        raise ValueError(f"{folder}: expected {_PREFIX}adversarial.json, random and popular, and no other JSON files")
    rows = {}
    for name, path in zip(names, files, strict=True):
        rows[name] = _label_file(path)
        sources.note(path.name, path, "annotations", rows=len(rows[name]))
    path = sources.path("questions")
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    split: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(path, ("question_id", "image", "text", "category")), 1):
        if str(row["question_id"]) in split or not isinstance(row["text"], str):
            raise ValueError(f"{path}, row {number}: question_id {row['question_id']!r} is repeated or has no text")
        questions[str(row["category"])].append(row)
        split[str(row["question_id"])] = str(row["category"])
    absent = sorted(set(questions) - set(rows))
    if absent:
        raise ValueError(f"{folder} has no labels of the split {', '.join(absent)} that {path} asks for")
    sources.note("questions", path, "questions", rows=len(split))
    return Labels(rows, dict(questions), split)


def unknown(labels: Labels, asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions that have no label."""
    return [str(q.id) for q in asked if str(q.id) not in labels.split]


def _same(question: Mapping[str, Any], label: Mapping[str, Any]) -> bool:
    """Return whether a question and a label row match; a misspelling that later labels correct is ignored."""
    text = question["text"].split("\n")[0].replace("imange", "image")
    return question["image"] == label["image"] and text == label["text"].replace("imange", "image")


def _gold(name: str, labels: Labels, whole: bool) -> dict[str, bool]:
    """Return question id -> whether the label is yes, for a split, in the order of the question file.

    Args:
        name: split.
        labels: labels of all splits.
        whole: whether every label must have a question; False for a part of the question file.
    """
    questions, rows = labels.questions[name], labels.rows[name]
    if whole and len(questions) != len(rows):
        raise ValueError(f"{name}: {len(questions)} questions but {len(rows)} labels. {_HINT}")
    gold, at = {}, 0
    for question in questions:
        while not whole and at < len(rows) and not _same(question, rows[at]):
            at += 1
        if at >= len(rows) or not _same(question, rows[at]):
            key = question["question_id"]
            raise ValueError(f"{name}: question {key} and label {at + 1} do not match. {_HINT}")
        gold[str(question["question_id"])] = rows[at]["label"] == "yes"
        at += 1
    return gold


def _figures(predicted: Sequence[bool], gold: Sequence[bool]) -> dict[str, Any]:
    tp, fp, tn, fn = (
        sum(s == a and g == b for s, g in zip(predicted, gold, strict=True))
        for a, b in ((True, True), (True, False), (False, False), (False, True))
    )
    out: dict[str, Any] = {"samples": len(predicted), "TP": tp, "FP": fp, "TN": tn, "FN": fn}
    precision, recall = tp / (tp + fp) if tp + fp else None, tp / (tp + fn) if tp + fn else None
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
    share = (tp + tn) / len(predicted)
    yes = {"yes_ratio": sum(predicted) / len(predicted)}
    return {**out, "accuracy": share, "precision": precision, "recall": recall, "f1_score": f1, **yes}


def _check(name: str, rows: Sequence[Mapping[str, Any]], ids: Sequence[str], labels: Labels) -> None:
    """Refuse answers unless there is one for each question, in order."""
    given = [str(r["question_id"]) for r in rows]
    if len(given) != len(ids):
        there = set(given)
        missing = [i for i in ids if i not in there]
        tail = f"; missing are {shown(missing)}; {WAY_OUT}" if missing else ""
        raise ValueError(f"{name}: {len(given)} answers for {len(ids)} questions{tail}")
    for place, (key, wanted) in enumerate(zip(given, ids, strict=True), 1):
        if key != wanted:
            raise ValueError(f"{name}: answer {place} is for question {key}, the question file has {wanted} there")
    texts = {str(q["question_id"]): q["text"].split("\n")[0] for q in labels.questions[name]}
    for row in rows:
        prompt = row.get("prompt", "")
        if prompt and texts[str(row["question_id"])] not in prompt:
            raise ValueError(
                f"{name}: question {row['question_id']} is {texts[str(row['question_id'])]!r}, its answer was given to "
                f"{prompt[:80]!r}; the file is shifted or mixed"
            )


def _questions(answers: Sequence[Mapping[str, Any]], labels: Labels, golds: Mapping[str, bool]) -> QuestionScores:
    """Return (score, split) of each answer row; the score is None if the question is not scored."""
    out: QuestionScores = []
    for row in answers:
        key = str(row["question_id"])
        right = float(says_yes(row["text"]) == golds[key]) if key in golds else None
        out.append((right, labels.split[key]))
    return out


def units(answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> Units:
    """Return the units of the bootstrap: every question is a unit of its split.

    The mean F1 follows from the shares of TP, FP and FN in each split.
    """
    groups, values = [], []
    for row, score in zip(answers, scores, strict=True):
        if score["score"] is not None:
            predicted, right = says_yes(row["text"]), score["score"] == 1
            groups.append(str(score["type"]))
            values.append(
                [float(predicted and right), float(predicted and not right), float(not predicted and not right)]
            )
    return Units(groups, values, _mean_f1)


def _mean_f1(shares: Array) -> Array:
    """Compute the mean F1 in percent from (draws, splits, 3) shares of TP, FP and FN.

    The F1 of a split without true positives is 0.
    """
    tp, wrong = shares[..., 0], shares[..., 1] + shares[..., 2]
    f1: Array = 2 * tp / np.maximum(2 * tp + wrong, 1e-12)  # (draws, splits)
    return 100 * f1.mean(1)


def score(
    answers: Iterable[Mapping[str, Any]], labels: Labels, asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute the mean F1 of the splits in percent.

    Args:
        answers: rows with `question_id` and `text` in the order of the question file.
        labels: labels, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None for all.

    Returns:
        figure (None if a split has no true positive, for which the official script divides by zero), rows, details
        (shares, not percent), and questions ((score, split) of each answer row).

    Raises:
        ValueError: if answers, questions and labels do not match row by row.
    """
    answers = list(answers)
    by_split: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in answers:
        key = str(row["question_id"])
        if key not in labels.split:
            raise ValueError(f"answers to question {key}, which the question file does not have")
        by_split[labels.split[key]].append(row)
    only = None if asked is None else {str(q.id) for q in asked}
    details: dict[str, Any] = {}
    golds: dict[str, bool] = {}
    for name in [*SPLITS, *sorted(set(labels.rows) - set(SPLITS))]:
        if name not in labels.rows or (only is not None and name not in labels.questions):
            continue
        if name not in labels.questions:
            raise ValueError(f"{name}: the question file has no question of this split, but there are labels")
        gold = {k: g for k, g in _gold(name, labels, only is None).items() if only is None or k in only}
        if not gold:
            continue
        _check(name, by_split[name], list(gold), labels)
        details[name] = _figures([says_yes(r["text"]) for r in by_split[name]], list(gold.values()))
        golds |= gold
    if not details:
        raise ValueError("the answers and the question file have no question id in common; give files of one run")
    undefined = [n for n, d in details.items() if d["f1_score"] is None]
    why = f"{', '.join(undefined)}: no right yes, so F1 is undefined (the official script divides by zero)"
    values = list(details.values())
    rows = sum(d["samples"] for d in values)
    mean = None if undefined else sum(d["f1_score"] for d in values) / len(values)
    details |= {"average_f1": mean, "average_accuracy": sum(d["accuracy"] for d in values) / len(values)}
    figure = None if mean is None else 100 * mean
    out = {"figure": figure, "rows": rows, "details": details, "why": why if undefined else None}
    return {**out, "questions": _questions(answers, labels, golds)}
