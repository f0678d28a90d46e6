"""MMBench, English and Chinese: circular accuracy for tables with answers, and the upload sheet."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...stats import share
from ..images import open_rgb
from ..reading import last_by_id, read_table, unanswered
from ..reading import read_answers as read_lines
from ..resample import Units, mean_units
from ..task import Question, QuestionScores, Sources

LETTERS = "ABCD"
CIRCLE = 1_000_000
"""The indices of one question's rows, its rotations, differ by multiples of this number."""
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PLACE = 6
"""Column of the upload sheet that holds the prediction."""
_START = re.compile(r"\(?([A-D])(?![A-Za-z'])")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
Row = dict[str, str | None]


def load_labels(sources: Sources) -> dict[str, Row]:
    """Read the rows of the table by index. A table without answers can be evaluated and uploaded, but not scored.

    Raises:
        ValueError: for a missing index, or one that is not an integer or is repeated.
    """
    path = sources.path("questions")
    known: dict[str, Row] | None = sources.cache.get(str(path))
    if known is not None:
        return known
    table: dict[str, Row] = {}
    for number, row in enumerate(read_table(path, ("index",)), 1):
        index = (row["index"] or "").removesuffix(".0")
        if not index.isascii() or not index.isdecimal() or len(index) > 18:
            raise ValueError(f"{path}, row {number}: index must be an integer, found {row['index']!r}")
        if str(int(index)) in table:
            raise ValueError(f"{path}, row {number}: index {index} is repeated; fetch the file again")
        answer = row.get("answer")
        if answer is not None and answer not in tuple(LETTERS):
            raise ValueError(f"{path}, row {number}: answer must be one of {', '.join(LETTERS)}, not {answer!r}")
        table[str(int(index))] = row
    questions = len({int(k) % CIRCLE for k in table})
    sources.note("questions", path, "questions", rows=len(table), questions=questions)
    sources.cache[str(path)] = table
    return table


def options(row: Row) -> list[str]:
    """Return the option texts before the first missing one; "none" and "nan" in any case are missing (LLaVA's rule)."""
    out: list[str] = []
    for key in LETTERS:
        value = row.get(key)
        if value is None or value.lower() in ("nan", "none"):
            break
        out.append(value)
    return out


def text_of(row: Row) -> str:
    """Return hint, question and options, one line each.

    Source: llava/eval/model_vqa_mmbench.py.
    """
    lines = [f"{key}. {option}" for key, option in zip(LETTERS, options(row), strict=False)]
    hint = row.get("hint")
    head = [] if hint is None or hint.lower() in ("nan", "none") else [hint]
    return "\n".join([*head, str(row["question"]), *lines])


def read_questions(sources: Sources) -> list[Question]:
    """Read one question for each row, rotations included. Images are opened from the table.

    Raises:
        ValueError: for rows without a question or an image.
    """
    table = load_labels(sources)
    payloads: dict[str, str] = {}
    out = []
    for key, row in table.items():
        payload = row.get("image") or ""
        if payload in table:  # it is the index of the row that has the image
            payload = table[payload].get("image") or ""
        if not payload or row.get("question") is None:
            raise ValueError(f"index {key}: columns question and image must not be empty; fetch the table again")
        name = hashlib.sha1(payload.encode(), usedforsecurity=False).hexdigest()
        payloads[name] = payload
        stored, given = text_of(row), options(row)
        extra = {"round_id": 0, "options": given, "option_char": list(LETTERS[: len(given)])}
        out.append(Question(int(key), name, sources.task.complete(stored), stored, extra))

    def open_image(name: str) -> Image.Image:
        try:
            content = base64.b64decode(payloads[name])
        except binascii.Error as error:
            raise ValueError(f"{label(name)} is not base64 ({error}); fetch the table again") from error
        return open_rgb(io.BytesIO(content), label(name))

    def label(name: str) -> str:
        key = next(str(q.id) for q in out if q.image == name)
        return f"column image of index {key}"

    sources.open_image = open_image
    return out


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read answers in LLaVA's format, or an upload sheet (.xlsx with index and prediction).

    Raises:
        ValueError: for anything else.
    """
    if path.suffix.lower() != ".xlsx":
        return read_lines(path)
    table = read_table(path, ("index", "prediction"), missing=("",))  # "None" is an answer
    return [{"question_id": r["index"] or "", "text": r["prediction"]} for r in table if r["prediction"] is not None]


def unknown(labels: Mapping[str, Row], asked: Sequence[Question]) -> list[str]:
    """Return the ids of questions that have no row."""
    return [str(q.id) for q in asked if str(q.id) not in labels]


def lenient(text: str, row: Row) -> str | None:
    """Return the letter at the start of an answer, or of the only option whose text is in the answer; else None.

    The evaluation server uses another rule.
    """
    found = _START.match(text.strip())
    if found:
        return found[1]
    held = [k for k, o in zip(LETTERS, options(row), strict=False) if o.lower() in text.lower()]
    return held[0] if len(held) == 1 else None


def _questions(answers: Sequence[Mapping[str, Any]], labels: Mapping[str, Row], ids: Sequence[str]) -> QuestionScores:
    """Return (score, category) of each answer row, a single rotation; the score is None if the row has no label."""
    wanted = set(ids)
    out: QuestionScores = []
    for row in answers:
        key = str(row["question_id"])
        label = labels.get(key, {})
        gold = label.get("answer") if key in wanted else None
        out.append((None if gold is None else float(row["text"].strip() == gold), label.get("category")))
    return out


def _check_prompts(answers: Sequence[Mapping[str, Any]], labels: Mapping[str, Row]) -> None:
    """Refuse answers to other questions, such as those to the English table for the Chinese one; spaces may differ."""
    for row in answers:
        key, prompt = str(row["question_id"]), row.get("prompt", "")
        question = labels.get(key, {}).get("question") or ""
        if prompt and "".join(question.split()) not in "".join(prompt.split()):
            raise ValueError(
                f"the question of index {key} is {question[:80]!r}, its answer was given to {prompt[:80]!r}; give the "
                "answers to this table"
            )


def units(answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> Units:
    """Return the units of the bootstrap: every question is a unit, with all its rotations."""
    groups: dict[int, list[float]] = defaultdict(list)
    for row in scores:
        if row["score"] is not None:
            groups[int(row["question_id"]) % CIRCLE].append(row["score"])
    return mean_units([float(all(found)) for found in groups.values()])


def score(
    answers: Iterable[Mapping[str, Any]], labels: Mapping[str, Row], asked: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Compute the circular accuracy in percent: a question is right if all of its rows have the right letter.

    An answer is right if it is the bare letter. The server may extract a letter from other answers, so the figure is a
    lower bound; `details` also has the accuracy with letters extracted by `lenient`.

    Args:
        answers: rows with `question_id` and `text`; the last row of a repeated id counts.
        labels: rows of the table, see `load_labels`.
        asked: the questions that the model was asked, if they are a part of the benchmark; None for all.

    Returns:
        figure (None for a table without answers), rows, details, scores by question, and questions ((score, category)
        of each answer row).

    Raises:
        ValueError: if a row has no answer, or one that was given to another question.
    """
    answers = list(answers)
    said = last_by_id(answers)
    ids = list(labels) if asked is None else [str(q.id) for q in asked if str(q.id) in labels]
    missing = [k for k in ids if k not in said]
    if missing:
        raise ValueError(unanswered(missing, len(ids), "rows"))
    _check_prompts(answers, labels)
    details: dict[str, Any] = {"answers_without_question": sum(k not in labels for k in said)}
    questions = _questions(answers, labels, ids)
    if any(labels[k].get("answer") is None for k in ids):
        why = "the table has no answers, so there is no local figure; send the upload sheet to the server"
        return {"figure": None, "rows": len(ids), "details": details, "why": why, "questions": questions}
    strict = {k: said[k].strip() == labels[k]["answer"] for k in ids}
    loose = {k: strict[k] or lenient(said[k], labels[k]) == labels[k]["answer"] for k in ids}
    groups: dict[int, list[str]] = defaultdict(list)
    for key in ids:
        groups[int(key) % CIRCLE].append(key)
    circular = {str(g): all(strict[k] for k in keys) for g, keys in groups.items()}
    overall = share(list(circular.values()))
    details = {
        "circular": overall,
        "circular_lenient": share([all(loose[k] for k in keys) for keys in groups.values()]),
        "single": share([strict[min(keys, key=int)] for keys in groups.values()]),
        "rows": share(list(strict.values())),
        "questions": len(groups),
        "not_a_letter": sum(said[k].strip() not in tuple(LETTERS) for k in ids),
        **details,
    }
    for column in ("category", "l2-category"):
        by: dict[str, list[bool]] = defaultdict(list)
        for group, keys in groups.items():
            by[str(labels[keys[0]].get(column))].append(circular[str(group)])
        if column in labels[ids[0]]:
            details[column] = {k: share(v) for k, v in sorted(by.items())}
    out = {"figure": overall["accuracy"], "rows": len(ids), "details": details, "scores": circular}
    return {**out, "questions": questions}


def export(answers: Iterable[Mapping[str, Any]], labels: Mapping[str, Row], folder: Path, name: str) -> list[Path]:
    """Write the upload sheet: the table without images and hints, with the unchanged answers as `prediction`.

    Source: scripts/convert_mmbench_for_submission.py.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    said = last_by_id(answers)
    names = [c for c in next(iter(labels.values())) if c not in DROPPED and c != "prediction"]
    names.insert(min(PLACE, len(names)), "prediction")
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(names)
    for key, row in labels.items():
        cells: list[Any] = []
        for column in names:
            value = int(key) if column == "index" else said.get(key) if column == "prediction" else row.get(column)
            cell = WriteOnlyCell(sheet, value=_CONTROL.sub("", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # "=A" is an answer, not a formula
            cells.append(cell)
        sheet.append(cells)
    path = folder / f"{name}.xlsx"
    book.save(path)
    return [path]
