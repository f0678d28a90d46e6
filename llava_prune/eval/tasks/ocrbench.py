"""OCRBench: the number of answers that contain a reference, out of 1,000."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reading import WAY_OUT, check_answers, read_json, read_rows
from ..resample import Units, mean_units, scores_of
from ..task import Question, Sources

FORMULAS = "HME100k"
"""Dataset whose answers are compared case-sensitively and without spaces."""
GROUPS = {
    "text recognition": (
        "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
        "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition",
    ),
    "scene text VQA": ("Scene Text-centric VQA",),
    "document VQA": ("Doc-oriented VQA",),
    "key information": ("Key Information Extraction",),
    "formulas": ("Handwritten Mathematical Expression Recognition",),
}  # fmt: skip
Row = dict[str, Any]


def load_labels(sources: Sources) -> list[Row]:
    """Read the rows of OCRBench.json, in order.

    Raises:
        ValueError: for broken rows.
    """
    path = sources.path("questions")
    rows = read_json(path, list)
    for number, row in enumerate(rows, 1):
        fields = ("dataset_name", "image_path", "question", "type")
        if not isinstance(row, dict) or not all(isinstance(row.get(f), str) for f in fields):
            raise ValueError(f"{path}, row {number}: needs the fields {', '.join(fields)} as strings")
        given = row.get("answers")
        if not (isinstance(given, str) or isinstance(given, list) and all(isinstance(g, str) for g in given)):
            raise ValueError(f"{path}, row {number}: answers must be a string or a list of strings")
    if not rows:
        raise ValueError(f"{path} has no rows")
    sources.note("questions", path, "questions", rows=len(rows))
    return rows


def read_questions(sources: Sources) -> list[Question]:
    """Read one question for each row, with the instruction for short answers of OCRBench's LLaVA-1.5 script."""
    out = []
    for number, row in enumerate(load_labels(sources)):
        text = sources.task.complete(row["question"])
        out.append(Question(row.get("id", number), row["image_path"], text, text))
    return out


def unknown(labels: Sequence[Row], asked: Sequence[Question]) -> list[str]:
    """Return an empty list: questions and labels are the same rows."""
    return []


def read_answers(path: Path) -> list[Row]:
    """Read answers in LLaVA's format, or the official result file (rows of OCRBench.json with `predict`).

    Raises:
        ValueError: for anything else.
    """
    rows = read_rows(path, ())
    if not any("predict" in r for r in rows):
        absent = [i for i, r in enumerate(rows, 1) if not {"question_id", "text"} <= set(r)]
        if absent:
            raise ValueError(f"{path}, row {absent[0]}: no field 'question_id' or 'text' (nor 'predict')")
        check_answers(path, rows)
        return rows
    out = [
        {"question_id": r.get("id", i), "text": r.get("predict", ""), "prompt": r.get("question", "")}
        for i, r in enumerate(rows)
    ]
    check_answers(path, out)
    return out


def right(text: str, row: Mapping[str, Any]) -> bool:
    """Return whether the answer contains a reference; an empty answer does not."""
    given = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]

    def plain(value: str) -> str:
        if row["dataset_name"] == FORMULAS:
            return value.strip().replace("\n", " ").replace(" ", "")
        return value.lower().strip().replace("\n", " ")

    return text != "" and any(plain(g) in plain(text) for g in given)


def _join(answers: Sequence[Mapping[str, Any]], labels: Sequence[Row]) -> list[int]:
    """Return the index of the answer row for each label.

    question_id may be the row's id (in the file's order, since ids are not unique), its number from 0 or 1, or its
    image. The first of these readings that gives each row one answer, with the question in its prompt, is used.

    Raises:
        ValueError: if no reading does.
    """
    ids = [str(a["question_id"]) for a in answers]
    if len(ids) != len(labels):
        hint = WAY_OUT if len(ids) < len(labels) else "give the answers of this question file"
        raise ValueError(f"{len(ids)} answers for {len(labels)} questions; {hint}")
    readings: list[Callable[[int, Row], str]] = [
        lambda i, r: str(r.get("id", i)),
        lambda i, r: str(i),
        lambda i, r: str(i + 1),
        lambda i, r: r["image_path"],
    ]
    for reading in readings:
        keys = [reading(i, r) for i, r in enumerate(labels)]
        if keys == ids:
            order = list(range(len(ids)))
        elif len(set(keys)) == len(keys) and set(keys) == set(ids):
            by_id = {k: i for i, k in enumerate(ids)}
            order = [by_id[k] for k in keys]
        else:
            continue
        pairs = zip((answers[i] for i in order), labels, strict=True)
        if all(not a.get("prompt") or r["question"] in a["prompt"] for a, r in pairs):
            return order
    doubled = [k for k, n in Counter(ids).items() if n > 1][:3]
    raise ValueError(
        "the answers do not match OCRBench.json row by row: question_id must be the row's id in the file's order (ids "
        f"are not unique), its number or its image; repeated here: {', '.join(doubled) or 'none'}"
    )


def units(answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> Units:
    """Return the units of the bootstrap: every question is a unit, and the figure is a sum."""
    found = scores_of(scores)
    return mean_units(found, len(found))


def score(
    answers: Iterable[Mapping[str, Any]], labels: Sequence[Row], asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Count the right answers out of all rows (1,000 in the official file), by type and group.

    Args:
        answers: rows with `question_id` and `text`.
        labels: rows of the question file, see `load_labels`.
        asked: the questions that the model was asked, if they are the first of the benchmark; None for all.

    Returns:
        figure, rows, details (share, groups, types), scores by row, their scale, and questions ((score, type) of each
        answer row).

    Raises:
        ValueError: if answers and rows do not match.
    """
    labels = labels if asked is None else labels[: len(asked)]
    answers = list(answers)
    order = _join(answers, labels)
    hits = [right(answers[i]["text"], r) for i, r in zip(order, labels, strict=True)]
    types: dict[str, dict[str, int]] = {}
    for hit, row in zip(hits, labels, strict=True):
        entry = types.setdefault(row["type"], {"right": 0, "rows": 0})
        entry["right"] += hit
        entry["rows"] += 1
    groups = {
        name: {f: sum(types[t][f] for t in members if t in types) for f in ("right", "rows")}
        for name, members in GROUPS.items()
        if any(t in types for t in members)
    }
    details = {"share": sum(hits) / len(hits), "groups": groups, "types": types}
    scores = {str(i): h for i, h in enumerate(hits)}
    found = {i: (float(h), r["type"]) for i, h, r in zip(order, hits, labels, strict=True)}
    out = {"figure": sum(hits), "rows": len(hits), "details": details, "scores": scores, "scale": len(hits)}
    return {**out, "questions": [found[i] for i in range(len(answers))]}
