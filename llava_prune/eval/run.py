"""Run benchmarks: every method at every budget on the same questions, each image encoded once."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import llava_prune

from ..arguments import RESULTS
from ..methods.planner import ALL, REFERENCE, Run
from . import identity
from .answers import ANSWERS, RESULT, Answers, locked, merge, model_id, read_finished, write_whole
from .asking import Bench, Files, answer, batches, load_model, prepare, tower_clock
from .finite import watched
from .plan import Settings, plan_runs
from .prompt import IMAGE_ID
from .result import Facts, compare, dump, make_result
from .task import (
    Question,
    Sources,
    Task,
    check_images,
    check_questions,
    load_task,
    open_images,
    questions_of,
    task_names,
)

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with (label of the run, answers done, answers in all)."""


def read_files(task: Task, settings: Settings) -> Files:
    """Find, read and check the files of a benchmark.

    Raises:
        ValueError: for missing or broken files, texts that no prompt can hold, missing images, or questions without an
            annotation.
    """
    sources = Sources(task, Path(settings.data).expanduser())
    questions = questions_of(sources)[: settings.limit]
    check_questions(questions, sources)
    check_images(questions, sources)
    labels = task.scorer.load_labels(sources)
    absent = task.scorer.unknown(labels, questions)
    if absent:
        shown, where = ", ".join(absent[:10]), sources.find("annotations") if "annotations" in task.files else "labels"
        raise ValueError(f"{where} lacks {len(absent)} of the {len(questions)} questions of {task.name}: {shown}")
    return Files(sources, questions, labels)


def present(name: str, data: Path) -> bool:
    """Whether the required files of a benchmark are in a folder of data."""
    sources = Sources(load_task(name), data)
    return all(sources.find(k) is not None for k, spec in sources.task.files.items() if not spec.optional)


def tasks_of(settings: Settings) -> list[str]:
    """Names of the benchmarks to run: a name, a list a,b, or "all" for those whose data are present.

    Raises:
        ValueError: for unknown names, or when no data are present.
    """
    if settings.task != ALL:
        names = [n.strip() for n in settings.task.split(",") if n.strip()]
        return [load_task(n).name for n in names] or [load_task(settings.task).name]
    data = Path(settings.data).expanduser()
    names = [n for n in task_names() if present(n, data)]
    if not names:
        raise ValueError(f"DATA={data} holds no benchmark's files; see llava-prune data {ALL}")
    return names


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


def checksums(bench: Bench) -> dict[str, str]:
    """Checksums of the questions, the prompts' token ids and the images, which all runs share."""
    sources, questions = bench.files.sources, bench.files.questions
    return {
        "questions": sources.versions["questions"]["sha256"],
        "prompts": identity.prompts(bench.rows),
        "images": identity.images(sources.image_files(questions)),
    }


def settings_of(
    settings: Settings, run: Run, bench: Bench, model: dict[str, Any], data: dict[str, str]
) -> dict[str, Any]:
    """Everything that may change an answer.

    Args:
        settings: of the evaluation.
        run: method and budget.
        bench: model and questions.
        model: see `identity.of_model`.
        data: see `checksums`.
    """
    return {
        "task": bench.task.name,
        **model,
        "method": run.name,
        "tokens": run.tokens,
        "hyper": identity.plain(run.method.hyper()),
        "method_source": identity.source(run),
        "max_new_tokens": bench.task.max_new_tokens,
        "limit": settings.limit,
        "seed": settings.seed,
        **data,
        "pad": bench.pad,
        "batch": settings.batch,
    }


def run_method(bench: Bench, run: Run, answers: Answers, progress: Progress, name: str) -> None:
    """Answer those questions of a chunk that have no answer yet."""
    part = list(answers.questions)
    progress(run.label, len(answers.rows), len(part))
    if answers.complete or len(answers.rows) >= len(part):
        return
    with llava_prune.pruned(bench.loaded.model, run.method) as handle:
        for numbers in batches(bench, part):
            if all(i in answers.rows for i in numbers):
                continue
            answers.add(answer(bench, handle, numbers, run, name))  # whole batches, as in a run without interruption
            progress(run.label, len(answers.rows), len(part))


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
        everything: all questions of the benchmark, in order.
    """

    out: Path
    questions: dict[int, Question]
    stem: str
    count: int
    everything: list[Question]

    def open(self, run: Run, wanted: dict[str, Any], batch: int, restart: bool) -> Answers:
        """The answers of a run; see `Answers`."""
        return Answers(self.out / run.label, wanted, self.questions, restart, {"batch": batch}, self.stem)


def find_place(settings: Settings, task: Task, files: Files) -> Place:
    """See `Place`.

    Raises:
        ValueError: for a chunk out of range.
    """
    part = chunk_of(len(files.questions), settings.num_chunks, settings.chunk_idx)
    stem = "" if settings.num_chunks == 1 else f"{settings.num_chunks}_{settings.chunk_idx}"
    questions = {i: files.questions[i] for i in part}
    return Place(out_folder(settings, task.name), questions, stem, settings.num_chunks, files.questions)


def evaluate(
    settings: Settings,
    progress: Progress = lambda *_: None,
    command: str = "",
    loaded: Any = None,
    task: str = "",
    model: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run every method at every budget, and write the answers, the official formats and the result of each run.

    Files, settings of earlier answers and images are checked before the first question is asked.

    Args:
        settings: what to run.
        progress: called after every batch.
        command: recorded in the results.
        loaded: a loaded model.
        task: benchmark, where it differs from `settings.task`.
        model: what is known of the loaded model, see `identity.of_model`.

    Returns:
        The results, the reference first; see `result.make_result`. Empty while other chunks are missing.

    Raises:
        ValueError: for bad input; answers so far stay on disk.
        OSError: when the disk is full or not writable.
    """
    bench_task = load_task(task or settings.task)
    if settings.max_new_tokens is not None:
        bench_task = dataclasses.replace(bench_task, max_new_tokens=settings.max_new_tokens)
    runs = plan_runs(settings, bench_task)
    files = read_files(bench_task, settings)
    place = find_place(settings, bench_task, files)
    torch.manual_seed(settings.seed)
    bench = prepare(settings, bench_task, files, runs, loaded)
    model = model or identity.of_model(bench.loaded, settings.model, settings.model_base)
    data = checksums(bench)
    wanted = [settings_of(settings, run, bench, model, data) for run in runs]
    check_first(place, runs, wanted, bench, settings.restart)
    results: list[dict[str, Any]] = []
    with (
        bench.loaded.remember_images([r.method for r in runs]) as bench.images,
        tower_clock(bench),
        watched(bench.loaded) as bench.logits,
    ):
        for run, values in zip(runs, wanted, strict=True):
            with place.open(run, values, bench.batch, settings.restart) as answers:
                bench.batch = answers.settings["batch"]
                run_method(bench, run, answers, progress, model_id(settings.model))
                seconds = answers.seconds()
                rows = answers.finish()
                if not place.stem:
                    results.append(finish(bench, run, place, rows, answers.settings, seconds, command, results))
            if place.stem:
                results += join(bench, run, place, answers.settings, seconds, command, results)
    return results


def check_first(place: Place, runs: Sequence[Run], wanted: Sequence[Any], bench: Bench, restart: bool) -> None:
    """Refuse what is wrong with earlier answers or with images before anything is computed.

    Raises:
        ValueError: see `Answers`, and for an image that cannot be read.
    """
    complete = not restart
    for run, values in zip(runs, wanted, strict=True):
        if restart or not (place.out / run.label).is_dir():
            complete = False
            continue
        with place.open(run, values, bench.batch, False) as answers:
            complete = complete and answers.complete
    if not complete:
        open_images(bench.files.questions, bench.files.sources)


def join(
    bench: Bench, run: Run, place: Place, settings: Any, seconds: dict[str, float], command: str, before: Sequence[Any]
) -> list[dict[str, Any]]:
    """Join the chunks of a run, and score and export them, one process at a time; empty while a chunk is missing."""
    folder = place.out / run.label
    with locked(folder):
        joined, seconds = merge(folder, place.count, place.stem, seconds)
        if joined is None:
            return []
        rows = read_finished(folder / ANSWERS, place.everything, settings)
        return [finish(bench, run, place, rows, settings, seconds, command, before)]


def finish(
    bench: Bench,
    run: Run,
    place: Place,
    rows: Sequence[dict[str, Any]],
    settings: Any,
    seconds: dict[str, float],
    command: str,
    before: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Score a complete run, and write the formats of the official tools and the result.

    Args:
        bench: model and questions.
        run: method and budget.
        place: where the files go.
        rows: rows of the answer file.
        settings: of the answers.
        seconds: stage -> seconds.
        command: recorded in the result.
        before: results of earlier runs; the first is compared with where it is the reference.
    """
    start, scorer, folder = time.perf_counter(), bench.task.scorer, place.out / run.label
    score = scorer.score(rows, bench.files.labels, bench.files.questions)
    if hasattr(scorer, "export"):
        scorer.export(rows, bench.files.labels, folder, run.label)
    seconds = {"load": bench.load, **seconds, "score": time.perf_counter() - start}
    text = [sum(i != IMAGE_ID for i in r) for r in bench.rows]
    facts = Facts(bench.task.name, bench.task.figure, bench.loaded.size, settings)
    result = make_result(facts, run.label, score, rows, text, seconds)
    result = {**result, "files": bench.files.sources.versions, "command": command}
    compare(result, before[0] if before and before[0]["method"] == REFERENCE else None)
    write_whole(folder / RESULT, dump(result))
    return result


def evaluate_all(
    settings: Settings, progress: Callable[[str], Progress], command: str = ""
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Run several benchmarks with one loaded model; a failure of one does not stop the others.

    Args:
        settings: what to run; see `tasks_of`.
        progress: gives the progress callback of a benchmark.
        command: recorded in the results.

    Returns:
        Results by benchmark, and the messages of those that failed.

    Raises:
        ValueError: when the only benchmark fails or the model cannot be loaded.
    """
    names = tasks_of(settings)
    if len(names) == 1:
        return {names[0]: evaluate(settings, progress(names[0]), command, task=names[0])}, {}
    plan_runs(settings)  # raises before the model is loaded
    results, failed = {}, {}
    for name in names:
        try:
            read_files(load_task(name), settings)
        except ValueError as error:
            failed[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    loaded = load_model(settings)
    model = identity.of_model(loaded, settings.model, settings.model_base)
    for name in names:
        if name in failed:
            continue
        try:
            results[name] = evaluate(settings, progress(name), command, loaded, name, model)
        except ValueError as error:
            failed[name] = str(error)
    return results, failed
