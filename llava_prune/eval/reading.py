"""Readers for benchmark files: text, JSON, JSON lines and tables. Errors are ValueErrors that name the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

_NULL = frozenset(
    (
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
        "NULL", "NaN", "None", "n/a", "nan", "null",
    )
)  # fmt: skip
"""Cells that pandas reads as missing. LLaVA reads MMBench with pandas."""
_BROKEN = (ValueError, RecursionError)
Row = dict[str, Any]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file without its byte-order mark.

    Raises:
        ValueError: if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: expected type of the content, dict or list.

    Raises:
        ValueError: for broken JSON or another type.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON ({error}); fetch the file again") from error
    except RecursionError as error:
        raise ValueError(f"{path}: broken JSON (nested too deeply); fetch the file again") from error
    if not isinstance(value, kind):
        want = "object" if kind is dict else "array"
        raise ValueError(f"{path}: expected one JSON {want}, found a {type(value).__name__}")
    return value


def read_jsonl(path: Path, required: Sequence[str]) -> list[Row]:
    """Read the rows of a JSON-lines file.

    Raises:
        ValueError: naming file and line, for broken JSON, rows that are not objects, or missing fields.
    """
    rows = []
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except _BROKEN as error:
            raise ValueError(f"{path}, line {number}: broken JSON ({error}); fetch the file again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found a {type(row).__name__}")
        absent = [f for f in required if f not in row]
        if absent:
            raise ValueError(f"{path}, line {number}: no field {', '.join(map(repr, absent))}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_rows(path: Path, required: Sequence[str]) -> list[Row]:
    """Read the objects of a JSON array or of a JSON-lines file.

    Raises:
        ValueError: see `read_jsonl`.
    """
    try:
        with open(path, "rb") as handle:
            array = handle.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if not array:
        return read_jsonl(path, required)
    rows = read_json(path, list)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, found a {type(row).__name__}")
        absent = [f for f in required if f not in row]
        if absent:
            raise ValueError(f"{path}, row {number}: no field {', '.join(map(repr, absent))}")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def check_answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse answers whose id, text or prompt has the wrong type.

    Raises:
        ValueError: naming the row.
    """
    for number, row in enumerate(rows, 1):
        key, text, prompt = row["question_id"], row["text"], row.get("prompt", "")
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ValueError(f"{path}, row {number}: question_id must be a string or integer, found {key!r}")
        if not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: text must be a string, found {text!r}")
        if not isinstance(prompt, str):
            raise ValueError(f"{path}, row {number}: prompt must be a string, found {prompt!r}")


def read_answers(path: Path) -> list[Row]:
    """Read an answer file in LLaVA's format: JSON lines with question_id, text and usually prompt.

    Raises:
        ValueError: for anything else.
    """
    rows = read_jsonl(path, ("question_id", "text"))
    check_answers(path, rows)
    return rows


def shown(keys: Iterable[Any]) -> str:
    """Join the first ten of some ids for a message."""
    keys = [str(k) for k in keys]
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")


WAY_OUT = "complete the run first, or score a part of the benchmark with --questions, a file of its questions"
"""Advice for messages about missing answers."""


def unanswered(missing: Sequence[Any], total: int, kind: str = "questions") -> str:
    """Return the message that `missing` of `total` questions have no answer."""
    return f"{len(missing)} of {total} {kind} have no answer ({shown(missing)}); {WAY_OUT}"


def last_by_id(answers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the text of each question id as a string.

    The last row of a repeated id counts, as in the dictionaries of the official tools.
    """
    return {str(a["question_id"]): a["text"] for a in answers}


def _cell(value: Any, missing: Collection[str]) -> str | None:
    text = "" if value is None else str(value)
    return None if text in missing else text


def _delimited(path: Path, delimiter: str) -> list[list[str]]:
    limit = csv.field_size_limit(1 << 30)  # cells can hold images
    try:
        text = read_text(path)
        if "\0" in text:
            raise ValueError(f"{path} contains null bytes; fetch the file again")
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: broken table ({error}); fetch the file again") from error
    finally:
        csv.field_size_limit(limit)


def _sheet(path: Path) -> list[list[Any]]:
    from openpyxl import load_workbook

    try:
        book = load_workbook(path, read_only=True, data_only=True)
        try:
            return [list(r) for r in book.worksheets[0].iter_rows(values_only=True)]
        finally:
            book.close()
    except Exception as error:  # openpyxl also raises the errors of its parsers
        raise ValueError(f"{path} is not a readable spreadsheet ({type(error).__name__}: {error})") from error


def read_table(path: Path, required: Sequence[str], missing: Collection[str] = _NULL) -> list[dict[str, str | None]]:
    """Read the rows of a .tsv, .csv or .xlsx file by column name.

    Args:
        path: the file.
        required: columns that the file must have.
        missing: texts of cells that are None; default those that pandas reads as missing.

    Raises:
        ValueError: for missing columns, rows with more cells than columns, or a broken file.
    """
    readers: dict[str, Callable[[], list[list[Any]]]] = {
        ".xlsx": lambda: _sheet(path),
        ".csv": lambda: _delimited(path, ","),
    }
    lines = [r for r in readers.get(path.suffix.lower(), lambda: _delimited(path, "\t"))() if any(r)]
    if len(lines) < 2:
        raise ValueError(f"{path} has no rows")
    names = [str(n) for n in lines[0]]
    absent = [c for c in required if c not in names]
    if absent:
        raise ValueError(f"{path}: no column {', '.join(absent)}")
    out = []
    for number, line in enumerate(lines[1:], 1):
        if len(line) > len(names):
            raise ValueError(f"{path}, row {number}: {len(line)} cells under {len(names)} columns; fetch it again")
        cells = chain(line, [None] * (len(names) - len(line)))
        out.append({n: _cell(c, missing) for n, c in zip(names, cells, strict=True)})
    return out
