"""VQAv2: the EvalAI upload, and the official accuracy if annotations exist."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stats import average
from ..reading import check_answers, last_by_id, read_json, read_jsonl, read_rows, shown, unanswered
from ..task import Question, QuestionScores, Sources
from ..vqa import digits_articles, m4c, one_line, punctuation

READY = "converted"
"""Field that marks answers that are already normalised."""


@dataclass(frozen=True)
class Labels:
    """Annotations and the ids of the upload.

    Attributes:
        annotations: question id -> annotation; None without annotations.
        upload: ids that the server expects, in order; None if the file is missing.
    """

    annotations: dict[str, dict[str, Any]] | None
    upload: list[Any] | None


def _annotation(row: Any) -> dict[str, Any]:
    references = [a["answer"] for a in row["answers"]]
    if not references or not all(isinstance(r, str) for r in references):
        raise TypeError("answers must be strings, at least one")
    kinds = {k: str(row.get(k, "unknown")) for k in ("answer_type", "question_type")}
    return {"id": str(row["question_id"]), "references": references, **kinds}


def load_labels(sources: Sources) -> Labels:
    """Read the annotations and the ids of the upload, if the files exist.

    Raises:
        ValueError: for broken files or a question that is annotated twice.
    """
    annotations, upload = None, None
    path = sources.find("annotations")
    if path is not None:
        rows = read_json(path).get("annotations")
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: no list named 'annotations'; fetch the file again")
        annotations = {}
        for number, row in enumerate(rows, 1):
            try:
                entry = _annotation(row)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, annotation {number}: no question_id with answers ({error!r})") from error
            if entry["id"] in annotations:
                raise ValueError(f"{path}, annotation {number}: question_id {entry['id']} is repeated")
            annotations[entry["id"]] = entry
        sources.note("annotations", path, "annotations", rows=len(annotations))
    path = sources.find("upload")
    if path is not None:
        upload = [r["question_id"] for r in read_jsonl(path, ("question_id",))]
        sources.note("upload", path, "upload", rows=len(upload))
    return Labels(annotations, upload)


def unknown(labels: Labels, asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions without a label; [] if no question has one (test-dev with annotations of val)."""
    known = labels.annotations or {}
    absent = [str(q.id) for q in asked if str(q.id) not in known]
    return absent if len(absent) < len(asked) else []


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read answers in LLaVA's format, or an upload (JSON array of question_id and answer).

    Raises:
        ValueError: for anything else.
    """
    rows = read_rows(path, ("question_id",))
    absent = [i for i, r in enumerate(rows, 1) if "text" not in r and "answer" not in r]
    if absent:
        raise ValueError(f"{path}, row {absent[0]}: no field 'text' (nor 'answer', the field of uploads)")
    rows = [r if "text" in r else {"question_id": r["question_id"], "text": r["answer"], READY: True} for r in rows]
    check_answers(path, rows)
    return rows


def accuracy(text: str, references: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, other annotators with this answer / 3).

    Answer and references are normalised only if the references differ from one another.

    Source: vqaEval.py of GT-Vision-Lab/VQA.
    """
    text, given = one_line(text), [one_line(r) for r in references]
    if len(set(given)) > 1:
        text, given = (digits_articles(punctuation(text)), [digits_articles(punctuation(r)) for r in given])
    same = given.count(text)
    return sum(min(1.0, (same - (g == text)) / 3) for g in given) / len(given)


def score(
    answers: Iterable[Mapping[str, Any]], labels: Labels, asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute the accuracy of the normalised answers in percent; `details.unconverted` is that of the raw texts.

    Args:
        answers: rows with `question_id` and `text`; the last row of a repeated id counts.
        labels: annotations, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None for all.

    Returns:
        figure (None without annotations), rows, details, scores by question, and questions ((score, answer type) of
        each answer row).

    Raises:
        ValueError: if an annotated question has no answer, or an answer has no annotation.
    """
    answers = list(answers)
    said, known = last_by_id(answers), labels.annotations
    ready = {str(a["question_id"]) for a in answers if a.get(READY) is True}
    ids = list(known or said) if asked is None else [str(q.id) for q in asked]
    if known is None or not any(k in known for k in said):
        why = "no annotations for these questions, so there is no local figure; send the upload to EvalAI"
        nothing = [(None, None)] * len(answers)
        return {"figure": None, "rows": len(said), "details": {}, "why": why, "questions": nothing}
    missing = [k for k in ids if k not in said]
    strange = [k for k in said if k not in known]
    if missing and not strange:
        raise ValueError(unanswered(missing, len(ids)))
    if strange:
        raise ValueError(
            f"{len(missing)} of {len(ids)} questions have no answer ({shown(missing) or '-'}) and {len(strange)} "
            f"answers no annotation ({shown(strange) or '-'}); answers and annotations must be of the same questions"
        )
    wanted, last = set(ids), {}
    questions: QuestionScores = []
    for row in answers:
        key, text = str(row["question_id"]), row["text"]
        questions.append((None, known[key]["answer_type"]))
        if key in wanted:
            last[key] = accuracy(text if key in ready else m4c(text), known[key]["references"])
            questions[-1] = last[key], known[key]["answer_type"]
    scores = {k: last[k] for k in ids}
    raw = [accuracy(said[k], known[k]["references"]) for k in ids]
    overall = average(list(scores.values()))
    details: dict[str, Any] = {"overall": overall, "unconverted": average(raw)}
    for field in ("answer_type", "question_type"):
        by: dict[str, list[float]] = defaultdict(list)
        for key in ids:
            by[known[key][field]].append(scores[key])
        details[f"by_{field}"] = {k: average(v) for k, v in sorted(by.items())}
    out = {"figure": overall["accuracy"], "rows": len(ids), "details": details, "scores": scores}
    return {**out, "questions": questions}


def export(answers: Iterable[Mapping[str, Any]], labels: Labels, folder: Path, name: str) -> list[Path]:
    """Write the EvalAI upload: every id of the test split, with a normalised answer or an empty one.

    Without the ids of the test split, or for answers to another split, the answered ids are written.

    Source: scripts/convert_vqav2_for_submission.py.
    """
    answers = list(answers)
    done = {str(a["question_id"]): a["text"] if a.get(READY) is True else m4c(a["text"]) for a in answers}
    first = {str(a["question_id"]): a["question_id"] for a in answers}
    test = labels.upload or []
    ids = test if any(str(i) in done for i in test) else list(first.values())
    path = folder / f"{name}.json"
    path.write_text(json.dumps([{"question_id": i, "answer": done.get(str(i), "")} for i in ids]), encoding="utf-8")
    return [path]
