"""Answer files of runs that may be interrupted at any moment and resumed.

During a run every answer is appended to a journal and flushed to disk. At the end the answer file is written in
question order. The settings of the run are stored in the same folder; a run with other settings is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None  # type: ignore[assignment]

ANSWERS, JOURNAL, SETTINGS = "answers.jsonl", "answers.partial.jsonl", "settings.json"
RESULT = "result.json"
JOURNAL_ONLY = ("row", "seconds", "tower_seconds")
"""Fields of a journal row that the answer file does not have; `row` is the number of the question."""


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: it has its old or its new content at any moment."""
    draft = path.with_name(path.name + ".draft")
    with open(draft, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(draft, path)


def model_id(path: str) -> str:
    """The model_id that LLaVA writes: the last path component, "parent_checkpoint-N" for a trainer's checkpoint.

    Source: llava/mm_utils.py, `get_model_name_from_path`.
    """
    parts = path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


def named(file: str, stem: str) -> str:
    """Name of a chunk's file: "4_0.jsonl", "4_0.partial.jsonl" or "4_0.settings.json"; `file` itself without a stem."""
    if not stem:
        return file
    return f"{stem}{file.removeprefix('answers')}" if file.startswith("answers") else f"{stem}.{file}"


def merge(
    folder: Path, count: int, stem: str, seconds: dict[str, float]
) -> tuple[list[dict[str, Any]] | None, dict[str, float]]:
    """Join the chunks of a run in order, when all are complete.

    Args:
        folder: folder of the run.
        count: number of chunks.
        stem: stem of the current chunk, whose settings the others must have.
        seconds: seconds of the current chunk.

    Returns:
        All rows, which are also written to the answer file, and the seconds of all chunks; None and the given seconds
        while a chunk is missing.

    Raises:
        ValueError: for chunks made with different settings.
    """
    stems = [f"{count}_{i}" for i in range(count)]
    if not all((folder / named(ANSWERS, s)).is_file() for s in stems):
        return None, seconds
    parts = [json.loads((folder / named(SETTINGS, s)).read_text(encoding="utf-8")) for s in [stem, *stems]]
    for other, name in zip(parts[1:], stems, strict=True):
        differ = [k for k in parts[0] if k != "batch" and other.get(k) != parts[0][k]]
        if differ:
            raise ValueError(
                f"chunk {name} in {folder} was made with another {', '.join(differ)}; run it again with --restart"
            )
    text = "".join((folder / named(ANSWERS, s)).read_text(encoding="utf-8") for s in stems)
    times = [json.loads((folder / named(RESULT, s)).read_text(encoding="utf-8"))["seconds"] for s in stems]
    write_whole(folder / ANSWERS, text)
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return rows, {k: sum(t.get(k, 0.0) for t in times) for k in ("tower", "generate")}


class Answers:
    """The answers of one method on one benchmark, in a folder of their own. Use as a context manager.

    Attributes:
        rows: answers by number of the question, those of interrupted runs included.
        settings: settings of the answers.
        complete: whether every question has an answer.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        restart: bool = False,
        fill: dict[str, Any] | None = None,
        stem: str = "",
    ) -> None:
        """Open or resume.

        Args:
            folder: folder of the run; made when missing.
            settings: every setting that may change an answer.
            restart: discard earlier answers.
            fill: values for settings that are None. A resumed run takes them from the folder instead.
            stem: stem of a chunk's files, "4_0" for the first of four; "" for the whole benchmark.

        Raises:
            ValueError: for settings other than the folder's, a broken line before the last, or a second writer.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._final = folder / named(JOURNAL, stem), folder / named(ANSWERS, stem)
        self._settings, self._result = folder / named(SETTINGS, stem), folder / named(RESULT, stem)
        self._handle = open(self._journal, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            self._lock()
            if restart:
                for path in (self._final, self._settings, self._result):
                    path.unlink(missing_ok=True)
                self._handle.truncate(0)
            self.settings = self._agree(settings, fill or {})
            self.complete = self._final.is_file()
            self.rows = self._read(self._final if self.complete else self._journal)
        except BaseException:
            self._handle.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *args: object) -> None:
        self._handle.close()
        with contextlib.suppress(OSError):
            if self._journal.stat().st_size == 0:
                self._journal.unlink()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing to {self.folder}; wait for it, or set OUT to another folder"
            ) from error

    def _agree(self, settings: dict[str, Any], fill: dict[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps(settings))
        free = {k for k in fill if plain.get(k) is None}
        if not self._settings.is_file():
            plain.update((k, fill[k]) for k in free)
            write_whole(self._settings, json.dumps(plain, indent=2) + "\n")
            return plain
        try:
            old = json.loads(self._settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self._settings} is broken; discard the answers in this folder with --restart"
            ) from error
        for key in sorted(set(old) | set(plain)):
            mine, theirs = plain.get(key), old.get(key)
            if mine == theirs or key in free:
                continue
            raise ValueError(
                f"the answers in {self.folder} were made with {key}={theirs!r}, now it is {mine!r}; "
                "set OUT to another folder, or discard them with --restart"
            )
        return old

    def _read(self, path: Path) -> dict[int, dict[str, Any]]:
        """Rows by number of the question; an incomplete last line of the journal is removed."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                rows[number if self.complete else row["row"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: broken; discard the answers with --restart") from error
        if len(whole) < len(content):
            with open(path, "r+b") as handle:
                handle.truncate(len(whole))
        return rows

    def seconds(self) -> dict[str, float]:
        """Seconds of all rows, spent in the vision tower and in the rest of generation."""
        if self.complete:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                old = json.loads(self._result.read_text(encoding="utf-8"))["seconds"]
                return {k: old[k] for k in ("tower", "generate")}
            return {}
        rows = self.rows.values()
        return {
            "tower": sum(r.get("tower_seconds", 0.0) for r in rows),
            "generate": sum(r.get("seconds", 0.0) for r in rows),
        }

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append answers and flush them to disk."""
        fresh = [r for r in rows if r["row"] not in self.rows]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh)
        rest = text.encode("utf-8")
        while rest:  # a full disk writes a part before it raises
            rest = rest[self._handle.write(rest) or 0 :]
        os.fsync(self._handle.fileno())
        self.rows.update((r["row"], r) for r in fresh)

    def finish(self, order: Sequence[int]) -> list[dict[str, Any]]:
        """Write the answer file in question order and empty the journal.

        Args:
            order: numbers of all questions.

        Raises:
            ValueError: when an answer is missing.
        """
        if self.complete:
            rows = list(self.rows.values())
            if len(rows) != len(order):
                raise ValueError(
                    f"{self._final} has {len(rows)} rows for {len(order)} questions; discard it with --restart"
                )
            return rows
        missing = [q for q in order if q not in self.rows]
        if missing:
            raise ValueError(f"{len(missing)} of {len(order)} questions have no answer; run the same command to resume")
        rows = [{k: v for k, v in self.rows[q].items() if k not in JOURNAL_ONLY} for q in order]
        if self._result.name != RESULT:  # a chunk: the joined result needs its seconds
            write_whole(self._result, json.dumps({"seconds": self.seconds()}) + "\n")
        write_whole(self._final, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        self._handle.truncate(0)
        self.complete = True
        return rows
