"""Decide which questions an evaluation asks, and where their answers are stored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods.planner import ALL, Run
from ..report.store import model_id
from .answers import SETTINGS, Answers, difference, rank_journal
from .asking import Files
from .pieces import piece_size
from .plan import Settings
from .task import Question, Task

log = logging.getLogger(__name__)


def chunk_of(total: int, count: int, index: int) -> range:
    """Return the question numbers of a chunk: a contiguous block of ceil(total / count), as in LLaVA.

    Raises:
        ValueError: for an index out of range, or an empty chunk.
    """
    if not 0 <= index < count:
        raise ValueError(f"CHUNK_IDX={index} is outside 0..{count - 1}; give one of these chunks (--chunk-idx)")
    size = -(-total // count)
    if index * size >= total:
        raise ValueError(
            f"CHUNK_IDX={index}: {total} questions in {count} chunks of {size} leave it empty; "
            f"use NUM_CHUNKS={-(-total // size)} (--num-chunks)"
        )
    return range(index * size, min(total, (index + 1) * size))


def out_folder(settings: Settings, task: str) -> Path:
    """Return the folder for a benchmark's results.

    It is OUT, OUT/<task> for several benchmarks, or <store>/<task>/<model> without OUT.
    """
    if settings.out:
        out = Path(settings.out).expanduser()
        return out / task if settings.task == ALL or "," in settings.task else out
    part = "" if settings.limit is None else f"-first{settings.limit}"
    return Path(settings.store).expanduser() / task / (model_id(settings.model) + part)


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the answers in a folder, of the whole benchmark or of a chunk; None if there are none."""
    for path in (folder / SETTINGS, *sorted(folder.glob(f"*.{SETTINGS}"))):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def folders_of(settings: Settings, out: Path, label: str, now: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folders whose answers agree with the settings that are known so far.

    With OUT, a run is in OUT/<label>. Without it, results go to a store, where any number of runs may have the same
    label; every folder of the store is checked.

    Args:
        settings: settings of the evaluation.
        out: folder for the results, see `out_folder`.
        label: label of the run.
        now: settings that must be equal.
    """
    plain = json.loads(json.dumps(now))
    places = [out / label] if settings.out else sorted(out.glob("*/"), key=lambda p: (p.name != label, p.name))
    for folder in places:
        stored = _settings_in(folder)
        if stored is not None and all(stored.get(k) == v for k, v in plain.items()):
            yield folder


def _free_folder(out: Path, label: str, now: Mapping[str, Any]) -> Path:
    """Return a new folder in the store for a run: out/<label>, or out/<label>-<checksum> if another run has that."""
    stored = _settings_in(out / label)
    if stored is None:
        return out / label
    plain = json.loads(json.dumps(now))
    folder = out / f"{label}-{hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]}"
    log.warning("%s: the earlier answers were %s; the new ones go to %s", label, difference(stored, plain), folder.name)
    return folder


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the answers of an evaluation are stored, and which questions they answer.

    Attributes:
        out: folder of all runs.
        questions: number -> question, for the questions of the chunk.
        stem: stem of a chunk's files; "" for the whole benchmark.
        count: number of chunks.
        piece: number of questions of a piece, see `pieces.pieces`.
        everything: all questions of the benchmark, in order.
        folders: label of a run -> its folder, unless that is out/<label>; see `find_folders`.
    """

    out: Path
    questions: dict[int, Question]
    stem: str
    count: int
    piece: int
    everything: list[Question]
    folders: dict[str, Path] = dataclasses.field(default_factory=dict)

    def folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folders.get(run.label, self.out / run.label)

    def find_folders(self, settings: Settings, runs: Sequence[Run], wanted: Sequence[Mapping[str, Any]]) -> None:
        """Find the folder of every run in the store by its settings, or choose a new one; do nothing with OUT.

        Args:
            settings: settings of the evaluation.
            runs: methods and budgets.
            wanted: all settings of each run.
        """
        for run, values in zip(runs, wanted, strict=True) if not settings.out else ():
            now = {k: v for k, v in values.items() if k != "batch" or v is not None}
            found = next(folders_of(settings, self.out, run.label, now), None)
            self.folders[run.label] = found or _free_folder(self.out, run.label, now)

    @staticmethod
    def stem_of(count: int, index: int) -> str:
        """Return the stem of the files of a chunk; "" for the whole benchmark."""
        return "" if count == 1 else f"{count}_{index}"

    def open(self, run: Run, wanted: dict[str, Any], batch: int, restart: bool) -> Answers:
        """Open the answers of a run; see `Answers`."""
        return Answers(self.folder(run), wanted, self.questions, restart, {"batch": batch}, self.stem)

    def journal(self, run: Run, rank: int) -> Path:
        """Return the path of the journal to which a process writes its answers of a run."""
        return rank_journal(self.folder(run), rank, self.stem)


def find_place(settings: Settings, task: Task, files: Files) -> Place:
    """Return the place of the answers of an evaluation, without the folders of its runs (see `Place.find_folders`).

    Raises:
        ValueError: for a chunk out of range.
    """
    part = chunk_of(len(files.questions), settings.num_chunks, settings.chunk_idx)
    stem = Place.stem_of(settings.num_chunks, settings.chunk_idx)
    questions = {i: files.questions[i] for i in part}
    piece = piece_size(len(questions), settings.batch)
    return Place(out_folder(settings, task.name), questions, stem, settings.num_chunks, piece, files.questions)
