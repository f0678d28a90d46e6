"""GQA: exact match over the balanced questions, as in the official eval.py."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...stats import share
from ..reading import last_by_id, read_json, unanswered
from ..task import Question, QuestionScores, Sources

PREDICTIONS = "testdev_balanced_predictions.json"
_NO_STEP = ("exist", "query: name", "choose name")


def prediction(text: str) -> str:
    """Return the prediction that GQA's tool compares: the answer in lower case without trailing dots.

    Source: LLaVA scripts/convert_gqa_for_eval.py.
    """
    return text.rstrip(".").lower()


def load_labels(sources: Sources) -> dict[str, Any]:
    """Read the annotation file: question id -> question.

    Raises:
        ValueError: for broken JSON, or questions that lack a field needed by the score or have one of another type.
    """
    path = sources.path("annotations")
    labels = read_json(path)
    for key, row in labels.items():
        wrong = _wrong_field(row)
        if wrong:
            raise ValueError(f"{path}: question {key!r}: {wrong}; fetch the file again")
    sources.note("annotations", path, "annotations", rows=len(labels))
    return labels


def _wrong_field(row: Any) -> str:
    """Describe a field of a question that the score cannot read; "" if all are valid.

    Only the answer and the structural type are required.
    """
    if not isinstance(row, dict):
        return f"expected a JSON object, found a {type(row).__name__}"
    types: Any = row.get("types")
    groups: Any = row.get("groups") or {}
    for name, table in (("types", types), ("groups", groups)):
        if not isinstance(table, dict):
            return f"{name} must be a JSON object, found {table!r:.60}"
    given = {"answer": row.get("answer"), "types.structural": types.get("structural")}
    given["question"] = row.get("question", "")
    given |= {"types.semantic": types.get("semantic", ""), "groups.global": groups.get("global", "")}
    for name, value in given.items():
        if not (isinstance(value, str) or (value is None and name in ("types.semantic", "groups.global"))):
            return f"{name} must be a string, found {value!r:.60}"
    if not isinstance(row.get("isBalanced", True), bool):
        return f"isBalanced must be true or false, found {row['isBalanced']!r:.60}"
    steps = row.get("semantic") or []
    named = isinstance(steps, list) and all(
        isinstance(s, dict) and all(isinstance(s.get(n), str) for n in ("operation", "argument")) for s in steps
    )
    return "" if named else "semantic must be a list of steps with operation and argument"


def unknown(labels: Mapping[str, Any], asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions that have no label."""
    return [str(q.id) for q in asked if str(q.id) not in labels]


def _steps(row: Mapping[str, Any]) -> int:
    named = (f"{s['operation']}: {s['argument']}" for s in row.get("semantic") or [])
    return sum(not any(o in name for o in _NO_STEP) for name in named)


def _distribution(gold: Mapping[str, Counter[str]], ours: Mapping[str, Counter[str]]) -> float:
    """Return the chi-square between the answer histograms of each global group, weighted by group size, over 100."""
    total = weight = 0.0
    for group, answers in gold.items():
        size = sum(answers.values())
        total += size * sum((ours[group][a] - e) ** 2 / e for a, e in answers.items())
        weight += size
    return total / weight / 100 if weight else 0.0


def _questions(
    answers: Sequence[Mapping[str, Any]], labels: Mapping[str, Any], wanted: Mapping[str, Any]
) -> QuestionScores:
    """Return (score, structural type) of each answer row; the score is None if the question is not scored.

    Of the official types, the structural one is used: it separates open questions (query) from binary ones.
    """
    out: QuestionScores = []
    for row in answers:
        key = str(row["question_id"])
        right = float(prediction(row["text"]) == wanted[key]["answer"]) if key in wanted else None
        out.append((right, labels[key]["types"]["structural"] if key in labels else None))
    return out


def score(
    answers: Iterable[Mapping[str, Any]], labels: Mapping[str, Any], asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute GQA's figures in percent.

    Args:
        answers: rows with `question_id` and `text`; the last row of a repeated id counts, as in the official tool.
        labels: annotations, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None scores every balanced
            question.

    Returns:
        figure (accuracy), rows, details (overall, binary, open, structural, semantic, steps, words, distribution),
        scores (id -> 0 or 1), and questions ((score, structural type) of each answer row).

    Raises:
        ValueError: if a balanced question has no answer, or there is nothing to score.
    """
    answers = list(answers)
    said = {k: prediction(t) for k, t in last_by_id(answers).items()}
    ids = labels if asked is None else {str(q.id) for q in asked}
    wanted = {k: q for k, q in labels.items() if q.get("isBalanced", True) and k in ids}
    missing = [k for k in wanted if k not in said]
    if missing:
        raise ValueError(unanswered(missing, len(wanted)))
    if not wanted:
        raise ValueError(
            "the answers and the annotation file have no balanced question in common; give files of one split"
        )
    correct = {k: said[k] == q["answer"] for k, q in wanted.items()}
    groups: dict[str, dict[Any, list[bool]]] = {
        n: defaultdict(list) for n in ("structural", "semantic", "steps", "words")
    }
    kinds: dict[str, list[bool]] = {"binary": [], "open": []}
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    ours: dict[str, Counter[str]] = defaultdict(Counter)
    for key, row in wanted.items():
        types = row["types"]
        groups["structural"][types["structural"]].append(correct[key])
        groups["semantic"][types.get("semantic")].append(correct[key])
        groups["steps"][_steps(row)].append(correct[key])
        groups["words"][len(row.get("question", "").split())].append(correct[key])
        kinds["open" if types["structural"] == "query" else "binary"].append(correct[key])
        group = (row.get("groups") or {}).get("global")
        if group is not None:
            gold[group][row["answer"]] += 1
            ours[group][said[key]] += 1
    tables = {
        n: {str(k): share(v) for k, v in sorted(t.items(), key=lambda i: _order(i[0]))} for n, t in groups.items()
    }
    overall = share(list(correct.values()))
    details = {
        "overall": overall,
        **{k: share(v) for k, v in kinds.items()},
        **tables,
        "distribution": _distribution(gold, ours),
        "answers_without_question": sum(k not in labels for k in said),
    }
    questions = _questions(answers, labels, wanted)
    out = {"figure": overall["accuracy"], "rows": len(wanted), "details": details, "scores": correct}
    return {**out, "questions": questions}


def _order(value: Any) -> tuple[bool, int, str]:
    return (not isinstance(value, int), value if isinstance(value, int) else 0, str(value))


def export(answers: Iterable[Mapping[str, Any]], labels: Any, folder: Path, name: str) -> list[Path]:
    """Write the prediction file of the official tool and return its path in a list."""
    rows = [{"questionId": str(a["question_id"]), "prediction": prediction(a["text"])} for a in answers]
    path = folder / PREDICTIONS
    path.write_text(json.dumps(rows), encoding="utf-8")
    return [path]
