"""Answer the questions of a benchmark under every method, in one or several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llava_prune

from ..methods.planner import Run
from .answers import Answers, AnswerWriter, DiscardingWriter, difference
from .asking import Bench, answer, encode
from .pieces import batches, pieces
from .place import Place
from .ranks import PAUSE, SharedTask

Progress = Callable[[str, int, int], None]
"""Called with (label of the run, number of answers, number of questions)."""
TOWER_BATCH = 16
"""Number of images in one pass of the vision tower."""


@dataclass
class Job:
    """One method at one budget, as seen by this process.

    Attributes:
        run: method and budget.
        writer: the answers of this process; in the first process, the answers of the run.
        before: number of answers that existed when the evaluation began.
        todo: numbers of the pieces that have questions without an answer.
        batch: batch size, halved when memory runs out.
    """

    run: Run
    writer: AnswerWriter
    before: int
    todo: set[int]
    batch: int


class Work:
    """The pieces of a benchmark, and the jobs to do on them.

    Attributes:
        jobs: one job for each run.
        total: number of questions.
    """

    def __init__(self, bench: Bench, parts: list[list[int]], shared: SharedTask, jobs: list[Job]) -> None:
        self.bench, self.shared, self.jobs, self._pieces = bench, shared, jobs, parts
        self.total = sum(map(len, parts))
        self._left = sorted(set().union(*(job.todo for job in jobs)))

    def report(self, progress: Progress) -> None:
        """Call `progress` with the number of answers of all processes; do nothing in processes other than the first."""
        for job in self.jobs if self.shared.first else ():
            progress(job.run.label, job.before + self.shared.answered(job.run.label), self.total)

    def do(self, progress: Progress, name: str) -> None:
        """Claim pieces and answer them until none is left.

        Args:
            progress: called after every batch.
            name: model_id of the rows.

        Raises:
            ValueError: for an image that cannot be read.
            OSError: if answers cannot be written.
        """
        for number in self._claims():
            self._answer(number, progress, name)
            self.bench.images.clear()
            self.bench.feed.drop(self._images(number))
        for job in self.jobs:
            job.writer.flush()

    def wait(self, progress: Progress) -> None:
        """Wait until the other processes have left."""
        while not self.shared.others_left:
            self.report(progress)
            time.sleep(PAUSE)
        self.report(progress)

    def _claims(self) -> Iterator[int]:
        """Yield the pieces of this process.

        While one piece is answered, the next one is already claimed, so that its images are read in the background.
        """
        ahead = self._claim()
        while ahead is not None:
            now, ahead = ahead, self._claim()
            yield now

    def _claim(self) -> int | None:
        at = self.shared.claim()
        if at >= len(self._left):
            return None
        self.bench.feed.order(self._images(self._left[at]))
        return self._left[at]

    def _images(self, number: int) -> list[str]:
        questions = (self.bench.files.questions[i] for i in self._pieces[number])
        return list(dict.fromkeys(q.image for q in questions if q.image is not None))

    def _answer(self, number: int, progress: Progress, name: str) -> None:
        """Answer a piece under all methods, after encoding its images.

        Batches do not depend on earlier answers, so that every question is always in the same batch and its answer has
        the same bits.
        """
        bench, numbers, images = self.bench, self._pieces[number], self._images(number)
        for job in self.jobs:
            if number not in job.todo:
                continue
            bench.batch = job.batch
            with llava_prune.pruned(bench.loaded.model, job.run.method) as handle:
                ahead: dict[str, float] = {}
                if images and handle.vision.variant is None:
                    ahead, images = encode(bench, images, TOWER_BATCH), []
                for some in batches(numbers, bench.lengths, job.writer.settings["batch"]):
                    if job.writer.done.issuperset(some):
                        continue
                    rows = answer(bench, handle, some, job.run, name)  # the whole batch, even if some answers exist
                    for row in rows:
                        row.update({k: row[k] + v / len(rows) for k, v in ahead.items()}, piece=number)
                    ahead = {}
                    self.shared.answered(job.run.label, job.writer.add(rows))
                    self.report(progress)
            job.batch = bench.batch


@contextmanager
def opened(
    bench: Bench, place: Place, runs: Sequence[Run], wanted: Sequence[dict[str, Any]], shared: SharedTask, restart: bool
) -> Iterator[Work]:
    """Open the answers of every run; the first process publishes the remaining work.

    Args:
        bench: model and questions.
        place: place of the answers.
        runs: methods and budgets.
        wanted: settings of each run, as found by this process.
        shared: the processes.
        restart: whether to discard earlier answers.

    Raises:
        ValueError: see `Answers`; in the other processes also for settings that differ from those of the first.
    """
    parts = pieces(place.questions, bench.lengths, place.piece)
    with ExitStack() as stack:
        if shared.first:
            jobs = []
            for run, values in zip(runs, wanted, strict=True):
                answers = stack.enter_context(place.open(run, values, bench.batch, restart))
                todo = {n for n, part in enumerate(parts) if not answers.done.issuperset(part)}
                jobs.append(Job(run, answers, len(answers.done), todo, answers.settings["batch"]))
            shared.publish({"jobs": [_published(job, parts, place) for job in jobs]})
        else:
            jobs = [
                _joined(run, values, published, place, shared, stack)
                for run, values, published in zip(runs, wanted, shared.receive()["jobs"], strict=True)
            ]
        yield Work(bench, parts, shared, jobs)


def _published(job: Job, parts: Sequence[Sequence[int]], place: Place) -> dict[str, Any]:
    """Return the facts about a job that the other processes need.

    "done" lists the answered questions in pieces that are not complete.
    """
    done = sorted(i for n in job.todo for i in parts[n] if i in job.writer.done)
    published = {"settings": job.writer.settings, "before": job.before, "todo": sorted(job.todo), "done": done}
    return {**published, "folder": str(place.folder(job.run))}


def _joined(
    run: Run, mine: dict[str, Any], published: dict[str, Any], place: Place, shared: SharedTask, stack: ExitStack
) -> Job:
    """Return the job of a process other than the first, from the facts that the first process has published."""
    settings = published["settings"]
    place.folders[run.label] = Path(published["folder"])
    unknown = [k for k, v in mine.items() if v is None and k in ("batch", "images")]
    found = difference(settings, mine, free=unknown)
    if found:
        raise ValueError(f"the first process would have its answers {found} here; give all machines the same files")
    if shared.tensor_parallel:
        writer: AnswerWriter = DiscardingWriter(settings, published["done"])
    else:
        writer = AnswerWriter(place.journal(run, shared.rank), settings, published["done"])
    return Job(run, stack.enter_context(writer), published["before"], set(published["todo"]), settings["batch"])


def collected(work: Work, errors: Sequence[str]) -> Iterator[tuple[Run, Answers]]:
    """Collect the answers of all processes and yield each run with its answers.

    Raises:
        ValueError: if a process failed and questions are left without an answer.
    """
    for job in work.jobs:
        answers = job.writer
        assert isinstance(answers, Answers)
        answers.collect()
        if errors and len(answers.done) < work.total:
            raise ValueError(errors[0])
        yield job.run, answers
