"""Which questions an evaluation asks, and where their answers go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..arguments import RESULTS
from ..methods.planner import ALL, Run
from .answers import Answers, model_id, rank_journal
from .asking import Files
from .pieces import piece_size
from .plan import Settings
from .task import Question, Task


def chunk_of(total: int, count: int, index: int) -> range:
    """Question numbers of a chunk: a contiguous block of ceil(total / count), as in LLaVA.

    Raises:
        ValueError: for an index out of range, or an empty chunk.
    """
    if not 0 <= index < count:
        raise ValueError(f"CHUNK_IDX={index} is outside 0..{count - 1}")
    size = -(-total // count)
    if index * size >= total:
        raise ValueError(
            f"CHUNK_IDX={index}: {total} questions in {count} chunks of {size} leave it empty; "
            f"use NUM_CHUNKS={-(-total // size)}"
        )
    return range(index * size, min(total, (index + 1) * size))


def out_folder(settings: Settings, task: str) -> Path:
    """Folder for a benchmark's results: OUT (OUT/<task> for several), or playground/results/<task>/<model>."""
    if settings.out:
        out = Path(settings.out).expanduser()
        return out / task if settings.task == ALL or "," in settings.task else out
    part = "" if settings.limit is None else f"-first{settings.limit}"
    return Path(RESULTS) / task / (model_id(settings.model) + part)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the answers of an evaluation go, and which of the questions they are to.

    Attributes:
        out: folder of all runs.
        questions: number -> question, of the chunk.
        stem: stem of a chunk's files; "" for the whole benchmark.
        count: number of chunks.
        piece: questions of a piece, see `pieces.pieces`.
        everything: all questions of the benchmark, in order.
    """

    out: Path
    questions: dict[int, Question]
    stem: str
    count: int
    piece: int
    everything: list[Question]

    @staticmethod
    def stem_of(count: int, index: int) -> str:
        """Stem of the files of a chunk; "" for the whole benchmark."""
        return "" if count == 1 else f"{count}_{index}"

    def open(self, run: Run, wanted: dict[str, Any], batch: int, restart: bool) -> Answers:
        """The answers of a run; see `Answers`."""
        return Answers(self.out / run.label, wanted, self.questions, restart, {"batch": batch}, self.stem)

    def journal(self, run: Run, rank: int) -> Path:
        """Where a process writes its answers."""
        return rank_journal(self.out / run.label, rank, self.stem)


def find_place(settings: Settings, task: Task, files: Files) -> Place:
    """See `Place`.

    Raises:
        ValueError: for a chunk out of range.
    """
    part = chunk_of(len(files.questions), settings.num_chunks, settings.chunk_idx)
    stem = Place.stem_of(settings.num_chunks, settings.chunk_idx)
    questions = {i: files.questions[i] for i in part}
    piece = piece_size(len(questions), settings.batch)
    return Place(out_folder(settings, task.name), questions, stem, settings.num_chunks, piece, files.questions)
