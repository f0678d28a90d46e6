"""Rows of answer files: their fields, their checksum, and reading files back with every row verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .task import Question

JOURNAL_ONLY = ("row", "piece", "seconds", "tower_seconds", "image_seconds")
"""Fields of a journal row that the answer file lacks. `row` is the question's number, `piece` that of its piece."""
WAY_OUT = "give another folder (OUT or --out), or discard the answers in this one with --restart"
Row = dict[str, Any]


def row_checksum(settings: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the answer_id of a row: a checksum over its content and its run's settings without the batch size."""
    import shortuuid

    key = {k: v for k, v in settings.items() if k != "batch"}
    content = {k: v for k, v in row.items() if k != "answer_id" and k not in JOURNAL_ONLY}
    text = json.dumps([key, content], sort_keys=True)
    return shortuuid.uuid(name=hashlib.sha256(text.encode()).hexdigest())


def check_row(row: Any, question: Question, settings: Mapping[str, Any]) -> None:
    """Refuse a row that is not this run's answer to the question.

    Raises:
        ValueError: with a message that continues "line 3: ...", such as "was edited, or is an answer of another run".
    """
    _check_object(row)
    for name, value in (("question_id", question.id), ("prompt", question.stored)):
        if row.get(name) != value:
            shown = json.dumps(row.get(name), ensure_ascii=False)[:80]
            raise ValueError(f"has {name} {shown}, the question has {json.dumps(value, ensure_ascii=False)[:80]}")
    if row.get("answer_id") != row_checksum(settings, row):
        raise ValueError("was edited, or is an answer of another run (its answer_id does not match)")


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"is {json.dumps(row)[:40]}, not an object")


def _numbered(content: bytes) -> list[tuple[int, bytes]]:
    """Return (number, line) of the lines that are not empty; the last line may lack its newline."""
    return [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def read_finished(path: Path, questions: Sequence[Question], settings: Mapping[str, Any]) -> list[Row]:
    """Read and verify the rows of a finished answer file. The file is never changed; its last newline may be missing.

    Args:
        path: the file.
        questions: its questions, in order.
        settings: settings of the run.

    Raises:
        ValueError: naming file and line, for anything but this run's answers to these questions in their order.
    """
    lines = _numbered(path.read_bytes())
    if len(lines) != len(questions):
        raise ValueError(f"{path} has {len(lines)} rows for {len(questions)} questions; {WAY_OUT}")
    rows = []
    for (number, line), question in zip(lines, questions, strict=True):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: is not JSON; {WAY_OUT}") from error
        try:
            check_row(row, question, settings)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; {WAY_OUT}") from error
        rows.append(row)
    return rows


def read_journal(path: Path, questions: Mapping[int, Question], settings: Mapping[str, Any]) -> tuple[list[Row], int]:
    """Read and verify the rows of a journal; return them and the length in bytes up to which the file is intact.

    An interruption may leave half a line or null bytes at the end, which are not part of that length.

    Raises:
        ValueError: naming file and line, for rows of other questions or of another run, or a broken line before intact
            ones.
    """
    rows: list[Row] = []
    whole = position = broken = 0
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        position += len(line) + 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            broken = broken or number
            continue
        if broken:
            raise ValueError(f"{path}, line {broken}: is not JSON; {WAY_OUT}")
        try:
            _check_numbered(row, questions, settings)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; {WAY_OUT}") from error
        rows.append(row)
        whole = position
    return rows, whole


def _check_numbered(row: Any, questions: Mapping[int, Question], settings: Mapping[str, Any]) -> None:
    _check_object(row)
    at = row.get("row")
    if isinstance(at, bool) or not isinstance(at, int) or at not in questions:
        raise ValueError(f"is for question number {json.dumps(at)[:40]}, which this run does not ask")
    check_row(row, questions[at], settings)
