"""Answer files of runs that may be interrupted at any moment and resumed.

During a run every answer is appended to a journal and flushed to disk. At the end the answer file is written in
question order. The settings of the run are stored beside them, and every row carries a checksum over the settings and
its own content, so that answers of another run are never taken for those of this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import shortuuid

from .task import Question

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None  # type: ignore[assignment]

ANSWERS, JOURNAL, SETTINGS = "answers.jsonl", "answers.partial.jsonl", "settings.json"
RESULT = "result.json"
LOCK = ".lock"
JOURNAL_ONLY = ("row", "seconds", "tower_seconds")
"""Fields of a journal row that the answer file does not have; `row` is the number of the question."""
WAY_OUT = "set OUT to another folder, or discard the answers in this one with --restart"
Row = dict[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: it has its old or its new content at any moment.

    The draft carries the number of the process, so that two of them do not write to the same one.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        with open(draft, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of a run's folder and hold it: one process at a time joins, scores and exports chunks."""
    with open(folder / LOCK, "ab") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# settings ---------------------------------------------------------------------------------------------------------


def _stored_settings(path: Path) -> dict[str, Any]:
    """Settings of a folder.

    Raises:
        ValueError: for a broken file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is broken, so nothing says how the answers beside it were made; {WAY_OUT}")


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings with one level: {"hyper": {"k0": 1}} becomes {"hyper.k0": 1}."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return out


def _difference(stored: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()) -> str | None:
    """The first setting that differs, with both values; None where none does."""
    old, new, absent = _flat(stored), _flat(now), object()
    for name in dict.fromkeys([*new, *old]):
        mine, theirs = new.get(name, absent), old.get(name, absent)
        if mine != theirs and name not in free:
            shown = ["not stated" if v is absent else f"{v!r:.100}" for v in (theirs, mine)]
            return f"made with {name}={shown[0]}, now it is {shown[1]}"
    return None


# rows -------------------------------------------------------------------------------------------------------------


def seal(settings: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The answer_id of a row: a checksum over the settings of its run (without the batch size) and its own content."""
    key = {k: v for k, v in settings.items() if k != "batch"}
    content = {k: v for k, v in row.items() if k != "answer_id" and k not in JOURNAL_ONLY}
    text = json.dumps([key, content], sort_keys=True)
    return shortuuid.uuid(name=hashlib.sha256(text.encode()).hexdigest())


def check_row(row: Any, question: Question, settings: Mapping[str, Any]) -> None:
    """Refuse a row that is not this run's answer to a question.

    Raises:
        ValueError: saying what is wrong with the row, as the end of a sentence.
    """
    _check_object(row)
    for name, value in (("question_id", question.id), ("prompt", question.stored)):
        if row.get(name) != value:
            shown = json.dumps(row.get(name), ensure_ascii=False)[:80]
            raise ValueError(f"has {name} {shown}, the question has {json.dumps(value, ensure_ascii=False)[:80]}")
    if row.get("answer_id") != seal(settings, row):
        raise ValueError("was edited, or is an answer of another run (its answer_id does not match)")


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"is {json.dumps(row)[:40]}, not an object")


def _numbered(content: bytes) -> list[tuple[int, bytes]]:
    """(number, line) of the lines that are not empty; the last one may lack its newline."""
    return [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def read_finished(path: Path, questions: Sequence[Question], settings: Mapping[str, Any]) -> list[Row]:
    """Rows of a finished answer file. The file is never changed; a missing last newline costs no row.

    Args:
        path: the file.
        questions: its questions, in order.
        settings: of the run.

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
    """Rows of a journal, and the length in bytes up to which it is whole.

    What an interruption leaves at the end, half a line or null bytes, is not counted.

    Raises:
        ValueError: naming file and line, for rows of other questions or of another run, or a broken line before others.
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


# chunks -----------------------------------------------------------------------------------------------------------


def merge(
    folder: Path, count: int, stem: str, seconds: dict[str, float]
) -> tuple[list[dict[str, Any]] | None, dict[str, float]]:
    """Join the chunks of a run in order, when all are complete. Call it while the folder is `locked`.

    Args:
        folder: folder of the run.
        count: number of chunks.
        stem: stem of the current chunk, whose settings the others must have.
        seconds: seconds of the current chunk.

    Returns:
        All rows, which are also written to the answer file with the settings beside it, and the seconds of all chunks;
        None and the given seconds while a chunk is missing.

    Raises:
        ValueError: for chunks made with different settings, or broken files.
    """
    stems = [f"{count}_{i}" for i in range(count)]
    if not all((folder / named(ANSWERS, s)).is_file() for s in stems):
        return None, seconds
    mine = _stored_settings(folder / named(SETTINGS, stem))
    for name in stems:
        found = _difference(_stored_settings(folder / named(SETTINGS, name)), mine, free=("batch",))
        if found:
            raise ValueError(f"chunk {name} in {folder} was {found} in chunk {stem}; run it again with --restart")
    text, times = "", []
    for name in stems:
        part = (folder / named(ANSWERS, name)).read_text(encoding="utf-8")
        text += part if part.endswith("\n") else part + "\n"
        times.append(_seconds(folder / named(RESULT, name)))
    _sweep(folder, (ANSWERS, SETTINGS, RESULT))
    write_whole(folder / SETTINGS, json.dumps(mine, indent=2) + "\n")
    write_whole(folder / ANSWERS, text)
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a chunk in {folder} has a line that is not JSON; run it again with --restart") from error
    return rows, {k: sum(t.get(k, 0.0) for t in times) for k in ("tower", "generate")}


def _seconds(path: Path) -> dict[str, float]:
    """Seconds of a result file; none where it is missing or broken, since no figure depends on them."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        old = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return {k: float(old[k]) for k in ("tower", "generate")}
    return {}


def _sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove drafts that killed processes left. The caller holds the lock of these files."""
    for name in names:
        for draft in folder.glob(f"{name}.*.draft"):
            number = draft.name.removeprefix(f"{name}.").removesuffix(".draft")
            if number.isdecimal() and not _runs(int(number)):
                with contextlib.suppress(OSError):
                    draft.unlink()


def _runs(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


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
        settings: Mapping[str, Any],
        questions: Mapping[int, Question],
        restart: bool = False,
        fill: Mapping[str, Any] | None = None,
        stem: str = "",
    ) -> None:
        """Open or resume.

        Args:
            folder: folder of the run; made when missing.
            settings: every setting that may change an answer.
            questions: number -> question, in order: those of the chunk.
            restart: discard earlier answers.
            fill: positive integers for settings that are None. A resumed run takes them from the folder instead.
            stem: stem of a chunk's files, "4_0" for the first of four; "" for the whole benchmark.

        Raises:
            ValueError: for answers with other settings than these, without settings, of other questions or edited, or
                a second writer.
        """
        self.folder, self.questions = folder, dict(questions)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._final = folder / named(JOURNAL, stem), folder / named(ANSWERS, stem)
        self._settings, self._result = folder / named(SETTINGS, stem), folder / named(RESULT, stem)
        self._handle = self._open()
        try:
            _sweep(folder, (self._final.name, self._settings.name, self._result.name))
            if restart:
                self._discard(stem)
            self.complete = self._final.exists()
            self.settings = self._agree(settings, fill or {}, stem)
            self.rows = self._read()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *args: object) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(self._handle.fileno()).st_size == 0:
                self._journal.unlink()
        self._handle.close()

    def _open(self) -> FileIO:
        """The journal, opened and locked."""
        while True:
            handle = open(self._journal, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
            if fcntl is None:
                return handle
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(handle):
                    return handle
            except BlockingIOError as error:
                handle.close()
                raise ValueError(
                    f"another run is writing to {self.folder}; wait for it, or set OUT to another folder"
                ) from error
            handle.close()

    def _is_current(self, handle: FileIO) -> bool:
        """Whether the journal is still this file: the run before may have removed it in between."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(handle.fileno()), os.stat(self._journal))
        return False

    def _discard(self, stem: str) -> None:
        """Remove earlier answers; those of a chunk and what was joined from it."""
        for path in (self._final, self._result, self._settings):
            path.unlink(missing_ok=True)
        self._handle.truncate(0)
        if stem:
            with locked(self.folder):
                for name in (ANSWERS, RESULT, SETTINGS):
                    (self.folder / name).unlink(missing_ok=True)

    def _agree(self, settings: Mapping[str, Any], fill: Mapping[str, Any], stem: str) -> dict[str, Any]:
        """Settings of the answers: those stored beside earlier ones, which must be the same, or the given."""
        now = json.loads(json.dumps(settings))
        free = [k for k in fill if now.get(k) is None]
        if stem and (self.folder / ANSWERS).exists():
            self._compare(self.folder / SETTINGS, now, ("batch",))
        if not self.complete and os.fstat(self._handle.fileno()).st_size == 0:
            return {**now, **{k: fill[k] for k in free}}
        stored = self._compare(self._settings, now, free)
        for name in free:
            if isinstance(stored.get(name), bool) or not isinstance(stored.get(name), int) or stored[name] < 1:
                raise ValueError(f"{self._settings}: {name} is {stored.get(name)!r}, not a positive integer; {WAY_OUT}")
        return stored

    def _compare(self, path: Path, now: Mapping[str, Any], free: Iterable[str]) -> dict[str, Any]:
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has answers without {path.name}, so nothing says how they were made; {WAY_OUT}"
            )
        stored = _stored_settings(path)
        found = _difference(stored, now, free)
        if found:
            raise ValueError(f"the answers in {self.folder} were {found}; {WAY_OUT}")
        return stored

    def _read(self) -> dict[int, Row]:
        """Rows by number of the question; what an interruption left at the end of the journal is removed."""
        if self.complete:
            found = read_finished(self._final, list(self.questions.values()), self.settings)
            self._handle.truncate(0)
            return dict(zip(self.questions, found, strict=True))
        rows, whole = read_journal(self._journal, self.questions, self.settings)
        self._handle.truncate(whole)
        return {r["row"]: r for r in rows}

    def seconds(self) -> dict[str, float]:
        """Seconds of all rows, spent in the vision tower and in the rest of generation."""
        if self.complete:
            return _seconds(self._result)
        rows = self.rows.values()
        return {
            "tower": sum(r.get("tower_seconds", 0.0) for r in rows),
            "generate": sum(r.get("seconds", 0.0) for r in rows),
        }

    def _store_settings(self) -> None:
        text = json.dumps(self.settings, indent=2) + "\n"
        if not self.rows:  # earlier answers have theirs
            write_whole(self._settings, text)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append answers and flush them to disk. Each gets its `answer_id`, see `seal`."""
        self._store_settings()
        fresh = [{**r, "answer_id": seal(self.settings, r)} for r in rows if r["row"] not in self.rows]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh)
        rest = text.encode("utf-8")
        while rest:  # a full disk writes a part before it raises
            rest = rest[self._handle.write(rest) or 0 :]
        os.fsync(self._handle.fileno())
        self.rows.update((r["row"], r) for r in fresh)

    def finish(self) -> list[Row]:
        """Write the answer file in question order and empty the journal.

        Raises:
            ValueError: when an answer is missing.
        """
        if self.complete:
            return [self.rows[q] for q in self.questions]
        missing = [q for q in self.questions if q not in self.rows]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.questions)} questions have no answer; run the same command to resume"
            )
        rows = [{k: v for k, v in self.rows[q].items() if k not in JOURNAL_ONLY} for q in self.questions]
        if self._result.name != RESULT:  # a chunk: the joined result needs its seconds
            write_whole(self._result, json.dumps({"seconds": self.seconds()}) + "\n")
        write_whole(self._final, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        self._handle.truncate(0)
        self.complete = True
        return rows
