"""Answer files of runs that may be interrupted at any moment and resumed.

During a run every process appends its answers to a journal of its own, which is flushed to disk. The first process
joins the journals and writes the answer file in question order. The settings of the run are stored beside them, and
every row carries a checksum over the settings and its own content, so that answers of another run are never taken for
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
from .rows import JOURNAL_ONLY, WAY_OUT, Row, read_finished, read_journal, seal
from .task import Question

JOURNAL, SETTINGS, TIMING = "answers.partial.jsonl", "settings.json", "timing.jsonl"
LOCK = ".lock"
STAGES = {"images": "image_seconds", "tower": "tower_seconds", "generate": "seconds"}
"""Stage of a run -> field of a journal row: waiting for images, vision tower, and the rest of generation."""


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


def difference(stored: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()) -> str | None:
    """The first setting that differs, with both values; None where none does."""
    old, new, absent = _flat(stored), _flat(now), object()
    for name in dict.fromkeys([*new, *old]):
        mine, theirs = new.get(name, absent), old.get(name, absent)
        if mine != theirs and name not in free:
            shown = ["not stated" if v is absent else f"{v!r:.100}" for v in (theirs, mine)]
            return f"made with {name}={shown[0]}, now it is {shown[1]}"
    return None


# chunks -----------------------------------------------------------------------------------------------------------


def merge(folder: Path, count: int, stem: str) -> bool:
    """Join the chunks of a run in order, when all are complete. Call it while the folder is `locked`.

    Args:
        folder: folder of the run.
        count: number of chunks.
        stem: stem of the current chunk, whose settings the others must have.

    Returns:
        Whether answer file and timing file were written, with the settings beside them; False while a chunk is missing.

    Raises:
        ValueError: for chunks made with different settings, or broken files.
    """
    stems = [f"{count}_{i}" for i in range(count)]
    if not all((folder / named(ANSWERS, s)).is_file() for s in stems):
        return False
    mine = _stored_settings(folder / named(SETTINGS, stem))
    for name in stems:
        found = difference(_stored_settings(folder / named(SETTINGS, name)), mine, free=("batch",))
        if found:
            raise ValueError(f"chunk {name} in {folder} was {found} in chunk {stem}; run it again with --restart")
    _sweep(folder, (ANSWERS, SETTINGS, RESULT, SCORES, TIMING))
    write_whole(folder / SETTINGS, json.dumps(mine, indent=2) + "\n")
    for file in (TIMING, ANSWERS):
        parts = [folder / named(file, name) for name in stems]
        texts = [p.read_text(encoding="utf-8") for p in parts if file == ANSWERS or p.is_file()]
        write_whole(folder / file, "".join(t if t.endswith("\n") else t + "\n" for t in texts))
    return True


def read_timing(path: Path) -> list[dict[str, Any]]:
    """Piece and seconds of each answer; none where the file is missing or broken, since no figure depends on them."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [{"piece": row["piece"], **{n: float(row[n]) for n in STAGES.values()}} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def total_seconds(path: Path) -> dict[str, float]:
    """Seconds of all answers in a timing file, by stage."""
    return _by_stage(read_timing(path))


def _by_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of answers, by stage."""
    return {k: sum(r[name] for r in rows) for k, name in STAGES.items()}


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


class AnswerWriter:
    """Appends the answers of one process to its journal. Use as a context manager.

    Attributes:
        settings: settings of the answers.
        done: numbers of the questions that have an answer.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], done: Iterable[int] = ()) -> None:
        """Open and lock a journal.

        Raises:
            ValueError: when another process writes to it.
        """
        self.journal, self.settings, self.done = Journal(path), dict(settings), set(done)

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, *args: object) -> None:
        self.journal.close()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Queue the answers to questions without one for the journal. Each gets its `answer_id`, see `seal`.

        Returns:
            The number of new answers.

        Raises:
            OSError: when earlier answers could not be written.
        """
        fresh = [{**r, "answer_id": seal(self.settings, r)} for r in rows if r["row"] not in self.done]
        self.journal.append("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh))
        self.done.update(r["row"] for r in fresh)
        return len(fresh)

    def flush(self) -> None:
        """Wait until all answers are on disk.

        Raises:
            OSError: when they could not be written.
        """
        self.journal.flush()


class Unwritten(AnswerWriter):
    """The answers of a process that answers the same questions as the first: nothing is written."""

    def __init__(self, settings: Mapping[str, Any], done: Iterable[int]) -> None:
        self.settings, self.done = dict(settings), set(done)

    def __exit__(self, *args: object) -> None:
        pass

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Note which questions have an answer; returns 0."""
        self.done.update(r["row"] for r in rows)
        return 0

    def flush(self) -> None:
        """Nothing is left to write."""


def rank_journal(folder: Path, rank: int, stem: str = "") -> Path:
    """The journal of a process; that of the first is `JOURNAL`."""
    return folder / named(f"answers.rank{rank}.partial.jsonl" if rank else JOURNAL, stem)


class Answers(AnswerWriter):
    """The answers of one method on one benchmark, in a folder of their own, as the first process of an evaluation
    handles them.

    Attributes:
        complete: whether every question has an answer in the answer file.
        seconds: stage -> seconds of all rows, see `STAGES`; set by `finish`.
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
        self.folder, self.questions, self._stem = folder, dict(questions), stem
        folder.mkdir(parents=True, exist_ok=True)
        self._final, self._settings = folder / named(ANSWERS, stem), folder / named(SETTINGS, stem)
        self._timing = folder / named(TIMING, stem)
        self.seconds: dict[str, float] = {}
        super().__init__(rank_journal(folder, 0, stem), settings)
        try:
            whole = () if stem else (RESULT, SCORES)
            _sweep(folder, (self._final.name, self._settings.name, self._timing.name, *whole))
            if restart:
                self._discard()
            self.complete = self._final.exists()
            self.settings = self._agree(settings, fill or {})
            self._read()
            if not self.done and not self.complete:  # earlier answers have theirs
                write_whole(self._settings, json.dumps(self.settings, indent=2) + "\n")
        except BaseException:
            self.journal.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def _others(self) -> list[Path]:
        """Journals of other processes than the first, also of an earlier run that was interrupted."""
        pattern = named("answers.rank*.partial.jsonl", self._stem)
        return sorted(self.folder.glob(pattern))

    def _discard(self) -> None:
        """Remove earlier answers; those of a chunk and what was joined from it."""
        for path in (self._final, self._timing, self._settings):
            path.unlink(missing_ok=True)
        for path in self._others():
            with contextlib.closing(Journal(path)) as other:
                other.truncate(0)  # and removed when it is closed
        self.journal.truncate(0)
        with locked(self.folder) if self._stem else contextlib.nullcontext():  # what chunks were joined to, too
            for name in (ANSWERS, RESULT, SCORES, SETTINGS, TIMING):
                (self.folder / name).unlink(missing_ok=True)

    def _agree(self, settings: Mapping[str, Any], fill: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the answers: those stored beside earlier ones, which must be the same, or the given."""
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
        """Verify earlier answers; what an interruption left at the end of the journal is removed."""
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
        """Move the answers in the journals of other processes to that of the first.

        Raises:
            ValueError: for a journal that is still written to, or rows of another run.
            OSError: when they cannot be written.
        """
        for path in self._others():
            with contextlib.closing(Journal(path)) as other:
                rows, _ = read_journal(path, self.questions, self.settings)
                self.add(rows)
                self.journal.flush()
                other.truncate(0)  # and removed when it is closed

    def finish(self) -> list[Row]:
        """Write answer file and timing file in question order and empty the journal; sets `seconds`.

        Raises:
            ValueError: when an answer is missing.
            OSError: when answers could not be written.
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
