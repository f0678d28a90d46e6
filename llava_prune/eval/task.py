"""What a benchmark is: one YAML file in tasks/ with its scorer module, and where its files lie under DATA."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: file name of its YAML.
        title: for tables.
        figure: name of the headline number.
        suffix: instruction line of every question.
        add_suffix: whether the runner appends it (False where the question file has it already).
        max_new_tokens: limit of an answer.
        layout: kind of file -> places under DATA, in order of preference.
        scorer: module with load_labels, score and export.
    """

    name: str
    title: str
    figure: str
    suffix: str
    add_suffix: bool
    max_new_tokens: int
    layout: dict[str, list[str]]
    scorer: ModuleType

    def find(self, data: Path, kind: str, folder: bool = False) -> Path:
        """The first place of a kind of file that exists.

        Raises:
            ValueError: when DATA is no folder or holds none of the places.
        """
        if not data.is_dir():
            raise ValueError(f"DATA={data}: no such folder; name the folder that holds {self.name}/ (DATA or --data)")
        places = [data / p for p in self.layout[kind]]
        for place in places:
            if place.is_dir() if folder else place.is_file():
                return place
        raise ValueError(
            f"no {kind} of {self.name}: looked for {', '.join(map(str, places))}; set DATA to the right folder"
        )


@dataclass(frozen=True)
class Question:
    """A line of a question file.

    Attributes:
        id: as the file has it.
        image: path under the image folder, or None.
        text: complete user text.
    """

    id: Any
    image: str | None
    text: str


def task_names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_task(name: str) -> Task:
    """A benchmark by name.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    if name not in task_names():
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(task_names())}")
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    module = importlib.import_module(f"llava_prune.eval.tasks.{raw['scorer']}")
    prompt = raw["prompt"]
    return Task(
        name, raw["title"], raw["figure"], prompt["suffix"], prompt["add"], raw["max_new_tokens"], raw["layout"], module
    )


def read_jsonl(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file.

    Raises:
        ValueError: naming file and line, for broken JSON, rows that are no objects, or missing fields.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: broken JSON ({error}); fetch the file again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found a {type(row).__name__}")
        absent = [f for f in required if f not in row]
        if absent:
            raise ValueError(f"{path}, line {number}: no field {', '.join(map(repr, absent))}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a JSON-lines file in order.

    Args:
        path: rows with question_id, text and usually image.
        limit: only the first so many.

    Raises:
        ValueError: for broken rows, ids of other types than str and int, or an id that comes twice.
    """
    out: list[Question] = []
    seen: set[str] = set()
    for number, row in enumerate(read_jsonl(path, ("question_id", "text")), 1):
        key, image, text = row["question_id"], row.get("image"), row["text"]
        if isinstance(key, bool) or not isinstance(key, (str, int)) or not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: question_id must be a string or integer and text a string")
        if image is not None and not isinstance(image, str):
            raise ValueError(f"{path}, row {number}: image must be a path, found {image!r}")
        if str(key) in seen:
            raise ValueError(f"{path}, row {number}: question_id {key!r} comes twice")
        seen.add(str(key))
        out.append(Question(key, image, text))
    return out[:limit]


def check_images(questions: Sequence[Question], folder: Path) -> None:
    """Refuse to start where pictures are missing.

    Raises:
        ValueError: naming at most ten of the missing files and their number.
    """
    named = sorted({q.image for q in questions if q.image is not None})
    missing = [n for n in named if not (folder / n).is_file()]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise ValueError(f"{len(missing)} of {len(named)} pictures are missing in {folder}: {shown}; add them there")


def file_version(path: Path) -> dict[str, Any]:
    """sha256 and size in bytes of a data file."""
    content = path.read_bytes()
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
