"""Run benchmarks: every method at every budget on the same questions, each image encoded once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import llava_prune

from ..arguments import RESULTS
from ..methods.planner import ALL, Run
from ..models.load import resolve
from .answers import RESULT, Answers, merge, model_id, write_whole
from .asking import Bench, Files, answer, batches, load_model, prepare, tower_clock
from .plan import Settings, fingerprint, plan_runs
from .prompt import IMAGE_ID
from .result import Facts, compare, dump, make_result
from .task import Sources, Task, check_images, load_task, questions_of, task_names

Progress = Callable[[str, int, int], None]
"""Called with (label of the run, answers done, answers in all)."""


def read_files(task: Task, settings: Settings) -> Files:
    """Find, read and check the files of a benchmark.

    Raises:
        ValueError: for missing or broken files, missing images, or questions without an annotation.
    """
    sources = Sources(task, Path(settings.data).expanduser())
    questions = questions_of(sources)[: settings.limit]
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


def plain(hyper: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as JSON stores them."""
    return {k: v if isinstance(v, (int, float, str, type(None))) else repr(v) for k, v in hyper.items()}


def settings_of(settings: Settings, run: Run, bench: Bench, checkpoint: str) -> dict[str, Any]:
    """Every setting that may change an answer."""
    loaded, parameter = bench.loaded, next(bench.loaded.model.parameters())
    return {
        "task": bench.task.name,
        "model": settings.model,
        "checkpoint": checkpoint,
        "method": run.name,
        "tokens": run.tokens,
        "hyper": plain(run.method.hyper()),
        "family": loaded.family,
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attn": settings.attn,
        "max_new_tokens": bench.task.max_new_tokens,
        "limit": settings.limit,
        "seed": settings.seed,
        "questions": bench.files.sources.versions["questions"]["sha256"],
        "pad": bench.pad,
    }


def run_method(bench: Bench, run: Run, answers: Answers, part: range, progress: Progress, name: str) -> None:
    """Answer those questions of a chunk that have no answer yet."""
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


def evaluate(
    settings: Settings, progress: Progress = lambda *_: None, command: str = "", loaded: Any = None, task: str = ""
) -> list[dict[str, Any]]:
    """Run every method at every budget, and write the answers, the official formats and the result of each run.

    Args:
        settings: what to run.
        progress: called after every batch.
        command: recorded in the results.
        loaded: a loaded model.
        task: benchmark, where it differs from `settings.task`.

    Returns:
        The results, the reference first; see `result.make_result`. Empty while other chunks are missing.

    Raises:
        ValueError: for bad input; answers so far stay on disk.
        OSError: when the disk is full or not writable.
    """
    bench_task = load_task(task or settings.task)
    if settings.max_new_tokens is not None:
        bench_task = dataclasses.replace(bench_task, max_new_tokens=settings.max_new_tokens)
    runs = plan_runs(settings)
    files = read_files(bench_task, settings)
    part = chunk_of(len(files.questions), settings.num_chunks, settings.chunk_idx)
    stem = "" if settings.num_chunks == 1 else f"{settings.num_chunks}_{settings.chunk_idx}"
    out = out_folder(settings, bench_task.name)
    torch.manual_seed(settings.seed)
    bench = prepare(settings, bench_task, files, runs, loaded)
    checkpoint = fingerprint(resolve(settings.model))
    results: list[dict[str, Any]] = []
    with bench.loaded.remember_images([r.method for r in runs]) as bench.images, tower_clock(bench):
        for run in runs:
            wanted = {**settings_of(settings, run, bench, checkpoint), "batch": settings.batch}
            with Answers(out / run.label, wanted, settings.restart, {"batch": bench.batch}, stem) as answers:
                bench.batch = answers.settings["batch"]
                run_method(bench, run, answers, part, progress, model_id(settings.model))
                seconds = answers.seconds()
                rows = answers.finish(part)
            if stem:
                joined, seconds = merge(out / run.label, settings.num_chunks, stem, seconds)
                if joined is None:
                    continue
                rows = joined
            result = finish(bench, run, out / run.label, rows, answers.settings, {"load": bench.load, **seconds})
            result["command"] = command
            compare(result, results[0] if settings.reference and results else None)
            write_whole(out / run.label / RESULT, dump(result))
            results.append(result)
    return results


def finish(
    bench: Bench, run: Run, folder: Path, rows: Sequence[dict[str, Any]], settings: Any, seconds: dict[str, float]
) -> dict[str, Any]:
    """Score a complete run, and write the formats of the official tools."""
    start, scorer = time.perf_counter(), bench.task.scorer
    score = scorer.score(rows, bench.files.labels, bench.files.questions)
    if hasattr(scorer, "export"):
        scorer.export(rows, bench.files.labels, folder, run.label)
    seconds = {**seconds, "score": time.perf_counter() - start}
    text = [sum(i != IMAGE_ID for i in r) for r in bench.rows]
    facts = Facts(bench.task.name, bench.task.figure, bench.loaded.size, settings)
    result = make_result(facts, run.label, score, rows, text, seconds)
    return {**result, "files": bench.files.sources.versions}


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
    loaded = load_model(settings)
    results, failed = {}, {}
    for name in names:
        try:
            results[name] = evaluate(settings, progress(name), command, loaded, name)
        except ValueError as error:
            failed[name] = str(error)
    return results, failed
