"""Answer files of runs that can be interrupted at any moment and resumed.

During a run, every process appends its answers to a journal of its own, which is flushed to disk. The first process
joins the journals and writes the answer file in question order. The settings of the run are stored beside the answers.
Every row carries a checksum over the settings and its own content, so answers of another run are never mistaken for
those of this one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report.store import ANSWERS, RESULT, SCORES
from .journal import Journal, fcntl
from .rows import JOURNAL_ONLY, WAY_OUT, Row, read_finished, read_journal, row_checksum
from .task import Question

JOURNAL, SETTINGS, TIMING = "answers.partial.jsonl", "settings.json", "timing.jsonl"
LOCK = ".lock"
STAGES = {"images": "image_seconds", "tower": "tower_seconds", "generate": "seconds"}
"""Stage of a run -> field of a journal row: waiting for images, the vision tower, and the rest of generation."""


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: at any moment it has either its old or its new content.

    The name of the draft contains the process id, so that two processes never write to the same draft.
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


def named(file: str, stem: str) -> str:
    """Return the name of a chunk's file, e.g. "4_0.jsonl", "4_0.partial.jsonl" or "4_0.settings.json".

    Without a stem, the name is `file` itself.
    """
    if not stem:
        return file
    return f"{stem}{file.removeprefix('answers')}" if file.startswith("answers") else f"{stem}.{file}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of a run's folder and hold it, so that only one process joins, scores and exports chunks."""
    with open(folder / LOCK, "ab") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# settings ---------------------------------------------------------------------------------------------------------


def _stored_settings(path: Path) -> dict[str, Any]:
    """Read the settings stored in a file.

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
    """Flatten nested settings: {"hyper": {"k0": 1}} becomes {"hyper.k0": 1}."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return out


def difference(stored: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()) -> str | None:
    """Describe the first setting that differs, with both values; return None if no setting differs.

    Args:
        stored: settings of earlier answers.
        now: settings of this run.
        free: flat names of settings that may differ.
    """
    old, new, absent = _flat(stored), _flat(now), object()
    for name in dict.fromkeys([*new, *old]):
        mine, theirs = new.get(name, absent), old.get(name, absent)
        if mine != theirs and name not in free:
            shown = ["not stated" if v is absent else f"{v!r:.100}" for v in (theirs, mine)]
            return f"made with {name}={shown[0]}, now it is {shown[1]}"
    return None


# chunks -----------------------------------------------------------------------------------------------------------


def merge(folder: Path, count: int, stem: str) -> bool:
    """Join the chunks of a run in order if all are complete. The caller holds the folder's lock (`locked`).

    Args:
        folder: folder of the run.
        count: number of chunks.
        stem: stem of the current chunk, whose settings the others must have.

    Returns:
        True if the answer, timing and settings files were written; False while a chunk is missing.

    Raises:
        ValueError: for chunks with different settings, or a broken settings file.
    """
    stems = [f"{count}_{i}" for i in range(count)]
    if not all((folder / named(ANSWERS, s)).is_file() for s in stems):
        return False
    mine = _stored_settings(folder / named(SETTINGS, stem))
    for name in stems:
        found = difference(_stored_settings(folder / named(SETTINGS, name)), mine, free=("batch",))
        if found:
            raise ValueError(f"chunk {name} in {folder} was {found} in chunk {stem}; run it again with --restart")
    _remove_stale_drafts(folder, (ANSWERS, SETTINGS, RESULT, SCORES, TIMING))
    write_whole(folder / SETTINGS, json.dumps(mine, indent=2) + "\n")
    for file in (TIMING, ANSWERS):
        parts = [folder / named(file, name) for name in stems]
        texts = [p.read_text(encoding="utf-8") for p in parts if file == ANSWERS or p.is_file()]
        write_whole(folder / file, "".join(t if t.endswith("\n") else t + "\n" for t in texts))
    return True


def read_timing(path: Path) -> list[dict[str, Any]]:
    """Return piece and seconds of each answer.

    The list is empty if the file is missing or broken, which is not an error, since no figure depends on it.
    """
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [{"piece": row["piece"], **{n: float(row[n]) for n in STAGES.values()}} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def total_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of all answers in a timing file, by stage."""
    return _by_stage(read_timing(path))


def _by_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum the seconds of answers by stage."""
    return {k: sum(r[name] for r in rows) for k, name in STAGES.items()}


def _remove_stale_drafts(folder: Path, names: Iterable[str]) -> None:
    """Remove the drafts left by processes that were killed. The caller holds the lock of these files."""
    for name in names:
        for draft in folder.glob(f"{name}.*.draft"):
            number = draft.name.removeprefix(f"{name}.").removesuffix(".draft")
            if number.isdecimal() and not _process_exists(int(number)):
                with contextlib.suppress(OSError):
                    draft.unlink()


def _process_exists(process: int) -> bool:
    """Return whether a process with this id runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


class AnswerWriter:
    """Appends the answers of one process to its journal. Use as a context manager.

    Attributes:
        settings: settings of the run.
        done: numbers of the questions that have an answer.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], done: Iterable[int] = ()) -> None:
        """Open and lock a journal.

        Raises:
            ValueError: if another process is writing to it.
        """
        self.journal, self.settings, self.done = Journal(path), dict(settings), set(done)

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, *args: object) -> None:
        self.journal.close()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Queue answers for the journal, except those to answered questions.

        Each row gets its `answer_id`, see `row_checksum`.

        Returns:
            The number of new answers.

        Raises:
            OSError: if earlier answers could not be written.
        """
        fresh = [{**r, "answer_id": row_checksum(self.settings, r)} for r in rows if r["row"] not in self.done]
        self.journal.append("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh))
        self.done.update(r["row"] for r in fresh)
        return len(fresh)

    def flush(self) -> None:
        """Wait until all answers are on disk.

        Raises:
            OSError: if they could not be written.
        """
        self.journal.flush()


class DiscardingWriter(AnswerWriter):
    """Answers of a process that answers the same questions as the first process; nothing is written."""

    def __init__(self, settings: Mapping[str, Any], done: Iterable[int]) -> None:
        self.settings, self.done = dict(settings), set(done)

    def __exit__(self, *args: object) -> None:
        pass

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Record which questions have an answer; return 0."""
        self.done.update(r["row"] for r in rows)
        return 0

    def flush(self) -> None:
        """Do nothing: there is nothing to write."""


def rank_journal(folder: Path, rank: int, stem: str = "") -> Path:
    """Return the path of a process's journal; that of the first process is `JOURNAL`."""
    return folder / named(f"answers.rank{rank}.partial.jsonl" if rank else JOURNAL, stem)


class Answers(AnswerWriter):
    """The answers of one method on one benchmark, in a folder of their own, as managed by the first process.

    Attributes:
        complete: whether every question has an answer in the answer file.
        seconds: stage -> seconds summed over all rows, see `STAGES`; set by `finish`.
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
        """Open the folder of a run, and resume from the answers in it.

        Args:
            folder: folder of the run; created if missing.
            settings: every setting that may change an answer.
            questions: number -> question, in order: the questions of the chunk.
            restart: whether to discard earlier answers.
            fill: positive integers that replace settings of None. A resumed run takes them from the folder instead.
            stem: stem of a chunk's files, e.g. "4_0" for the first of four; "" for the whole benchmark.

        Raises:
            ValueError: if earlier answers have other settings or none, belong to other questions or were edited, or
                if another process is writing to the folder.
        """
        self.folder, self.questions, self._stem = folder, dict(questions), stem
        folder.mkdir(parents=True, exist_ok=True)
        self._final, self._settings = folder / named(ANSWERS, stem), folder / named(SETTINGS, stem)
        self._timing = folder / named(TIMING, stem)
        self.seconds: dict[str, float] = {}
        super().__init__(rank_journal(folder, 0, stem), settings)
        try:
            whole = () if stem else (RESULT, SCORES)
            _remove_stale_drafts(folder, (self._final.name, self._settings.name, self._timing.name, *whole))
            if restart:
                self._discard()
            self.complete = self._final.exists()
            self.settings = self._agree(settings, fill or {})
            self._read()
            if not self.done and not self.complete:  # otherwise the settings are stored already
                write_whole(self._settings, json.dumps(self.settings, indent=2) + "\n")
        except BaseException:
            self.journal.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def _others(self) -> list[Path]:
        """Return the journals of all processes but the first, including those left by an earlier, interrupted run."""
        pattern = named("answers.rank*.partial.jsonl", self._stem)
        return sorted(self.folder.glob(pattern))

    def _discard(self) -> None:
        """Remove earlier answers and, for a chunk, the files that were joined from it."""
        for path in (self._final, self._timing, self._settings):
            path.unlink(missing_ok=True)
        for path in self._others():
            with contextlib.closing(Journal(path)) as other:
                other.truncate(0)  # an empty journal is removed when it is closed
        self.journal.truncate(0)
        with locked(self.folder) if self._stem else contextlib.nullcontext():  # files joined from chunks as well
            for name in (ANSWERS, RESULT, SCORES, SETTINGS, TIMING):
                (self.folder / name).unlink(missing_ok=True)

    def _agree(self, settings: Mapping[str, Any], fill: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the answers: the given ones, or those of earlier answers, which must agree."""
        now = json.loads(json.dumps(settings))
        free = [k for k in fill if now.get(k) is None]
        if self._stem and (self.folder / ANSWERS).exists():
            self._compare(self.folder / SETTINGS, now, ("batch",))
        if not self.complete and self.journal.empty and not any(p.stat().st_size for p in self._others()):
            return {**now, **{k: fill[k] for k in free}}
        stored = self._compare(self._settings, now, free)
        for name in free:
            if isinstance(stored.get(name), bool) or not isinstance(stored.get(name), int) or stored[name] < 1:
                raise ValueError(f"{self._settings}: {name} is {stored.get(name)!r}, not a positive integer; {WAY_OUT}")
        return stored

    def _compare(self, path: Path, now: Mapping[str, Any], free: Iterable[str]) -> dict[str, Any]:
        """Return the settings stored in a file, after checking that all but the `free` ones agree with `now`.

        Raises:
            ValueError: if the file is missing or broken, or a setting differs.
        """
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has answers without {path.name}, so nothing says how they were made; {WAY_OUT}"
            )
        stored = _stored_settings(path)
        found = difference(stored, now, free)
        if found:
            raise ValueError(f"the answers in {self.folder} were {found}; {WAY_OUT}")
        return stored

    def _read(self) -> None:
        """Verify earlier answers, and remove the broken end that an interruption left in the journal."""
        if self.complete:
            read_finished(self._final, list(self.questions.values()), self.settings)
            self.done = set(self.questions)
            self.journal.truncate(0)
            return
        rows, whole = read_journal(self.journal.path, self.questions, self.settings)
        self.journal.truncate(whole)
        self.done = {r["row"] for r in rows}
        self.collect()

    def collect(self) -> None:
        """Move the answers in the journals of the other processes to the journal of the first process.

        Raises:
            ValueError: for a journal that a process still writes to, or rows of another run.
            OSError: if the answers cannot be written.
        """
        for path in self._others():
            with contextlib.closing(Journal(path)) as other:
                rows, _ = read_journal(path, self.questions, self.settings)
                self.add(rows)
                self.journal.flush()
                other.truncate(0)  # an empty journal is removed when it is closed

    def finish(self) -> list[Row]:
        """Write the answer and timing files in question order, empty the journal, set `seconds` and return the rows.

        Raises:
            ValueError: if an answer is missing.
            OSError: if answers could not be written.
        """
        if self.complete:
            self.seconds = total_seconds(self._timing)
            return read_finished(self._final, list(self.questions.values()), self.settings)
        self.journal.flush()
        missing = len(self.questions.keys() - self.done)
        if missing:
            raise ValueError(
                f"{missing} of {len(self.questions)} questions have no answer; run the same command to resume"
            )
        found = {r["row"]: r for r in read_journal(self.journal.path, self.questions, self.settings)[0]}
        rows = [{k: v for k, v in found[q].items() if k not in JOURNAL_ONLY} for q in self.questions]
        times = [
            {"piece": found[q].get("piece"), **{n: found[q].get(n, 0.0) for n in STAGES.values()}}
            for q in self.questions
        ]
        write_whole(self._timing, "".join(json.dumps(t) + "\n" for t in times))
        write_whole(self._final, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        self.seconds = _by_stage(times)
        self.journal.truncate(0)
        self.complete = True
        return rows
