"""Answer files that survive a kill at any moment.

While a run goes on, every answer is appended to a journal and forced to disk. At the end the journal becomes the
answer file, in question order. The settings of the run lie beside it; other settings are refused.
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
JOURNAL_ONLY = ("seconds", "tower_seconds")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader or a kill sees the old content or the new, never a part."""
    draft = path.with_name(path.name + ".draft")
    with open(draft, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(draft, path)


def model_id(path: str) -> str:
    """The name LLaVA writes: the last path component, "parent_checkpoint-N" for a trainer's checkpoint.

    Source: llava/mm_utils.py, `get_model_name_from_path`.
    """
    parts = path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


class Answers:
    """The answers of one method on one benchmark, in a folder of their own.

    Use as a context manager; `rows` holds what earlier runs left, by question id as a string.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], restart: bool = False, fill: dict[str, Any] | None = None
    ) -> None:
        """Open or resume.

        Args:
            folder: made when missing.
            settings: everything that may change an answer.
            restart: discard what is there.
            fill: values for settings that are None. A resumed run takes the folder's instead.

        Raises:
            ValueError: for other settings than the folder's, a broken line that is not the last, or a second writer.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._final, self._settings = folder / JOURNAL, folder / ANSWERS, folder / SETTINGS
        self._handle = open(self._journal, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            self._lock()
            if restart:
                for path in (self._final, self._settings, folder / RESULT):
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
                f"another run is writing to {self.folder}; wait for it or set OUT to another folder"
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
            raise ValueError(f"{self._settings} is broken; use --restart to discard the answers beside it") from error
        for key in sorted(set(old) | set(plain)):
            mine, theirs = plain.get(key), old.get(key)
            if mine == theirs or key in free:
                continue
            raise ValueError(
                f"the answers in {self.folder} were made with {key}={theirs!r}, now it is {mine!r}; "
                "set OUT to another folder, or discard them with --restart"
            )
        return old

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        """Rows of the journal; a last line cut short by a kill is taken off the file."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                rows[str(row["question_id"])] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: broken; discard the answers with --restart") from error
        if len(whole) < len(content):
            with open(path, "r+b") as handle:
                handle.truncate(len(whole))
        return rows

    def seconds(self) -> dict[str, float]:
        """Seconds of the tower and of the rest of generation behind all rows, earlier runs included."""
        if self.complete:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                old = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))["seconds"]
                return {k: old[k] for k in ("tower", "generate")}
            return {}
        rows = self.rows.values()
        return {
            "tower": sum(r.get("tower_seconds", 0.0) for r in rows),
            "generate": sum(r.get("seconds", 0.0) for r in rows),
        }

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append answers and force them to disk."""
        fresh = [r for r in rows if str(r["question_id"]) not in self.rows]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh)
        rest = text.encode("utf-8")
        while rest:  # a disk that fills up takes a part first, then raises
            rest = rest[self._handle.write(rest) or 0 :]
        os.fsync(self._handle.fileno())
        self.rows.update((str(r["question_id"]), r) for r in fresh)

    def finish(self, order: Sequence[Any]) -> list[dict[str, Any]]:
        """Write the answer file in question order and drop the journal.

        Args:
            order: all question ids.

        Raises:
            ValueError: when an answer is missing.
        """
        missing = [q for q in order if str(q) not in self.rows]
        if missing:
            raise ValueError(f"{len(missing)} of {len(order)} questions have no answer yet; run again to go on")
        rows = [{k: v for k, v in self.rows[str(q)].items() if k not in JOURNAL_ONLY} for q in order]
        if not self.complete:
            write_whole(self._final, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self._handle.truncate(0)
            self.complete = True
        return rows
