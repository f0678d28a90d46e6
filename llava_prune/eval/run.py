"""Run benchmarks: every method at every budget answers the same questions, and each image is encoded once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..methods.checks import json_values
from ..methods.planner import ALL, REFERENCE, Run
from ..methods.registry import resolve
from ..report.store import model_id
from . import identity
from .answers import ANSWERS, RESULT, SCORES, TIMING, locked, merge, total_seconds, write_whole
from .asking import Bench, Files, load_model, prepare, tower_clock
from .finished import Origin, made, origins, stored_result
from .finite import watched
from .place import Place, chunk_of, find_place, folders_of, out_folder
from .plan import Settings, plan_runs
from .prompt import IMAGE_ID
from .ranks import Ranks, SharedTask
from .result import Facts, compare, dump, dump_scores, make_result, score_rows
from .rows import Row, read_finished
from .task import (
    Sources,
    Task,
    check_images,
    check_labels,
    check_questions,
    load_task,
    open_images,
    questions_of,
    task_names,
)
from .work import Progress, Work, collected, opened

log = logging.getLogger(__name__)


def read_files(task: Task, settings: Settings) -> Files:
    """Find, read and check the files of a benchmark.

    Raises:
        ValueError: for missing or broken files, texts that no prompt can hold, missing images, or questions and labels
            that do not belong together.
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
    check_labels(task, labels, questions)
    return Files(sources, questions, labels)


def present(name: str, data: Path) -> bool:
    """Return whether the required files of a benchmark are in a data folder."""
    sources = Sources(load_task(name), data)
    return all(sources.find(k) is not None for k, spec in sources.task.files.items() if not spec.optional)


def tasks_of(settings: Settings) -> list[str]:
    """Return the names of the benchmarks to run.

    They are a name, a list a,b, or "all" for every benchmark whose data are present.

    Raises:
        ValueError: for unknown names, or if no data are present.
    """
    if settings.task != ALL:
        names = dict.fromkeys(n.strip() for n in settings.task.split(",") if n.strip())
        return [load_task(n).name for n in names] or [load_task(settings.task).name]
    data = Path(settings.data).expanduser()
    there = [n for n in task_names() if present(n, data)]
    if not there:
        raise ValueError(f"DATA={data} holds no benchmark's files; see llava-prune data {ALL}")
    return there


def task_of(settings: Settings, name: str) -> Task:
    """Load a benchmark with the number of new tokens from the settings.

    Raises:
        ValueError: for an unknown name.
    """
    task, limit = load_task(name), settings.max_new_tokens
    return task if limit is None else dataclasses.replace(task, max_new_tokens=limit)


def checksums(bench: Bench, ranks: Ranks) -> dict[str, str | None]:
    """Return the checksums of the questions, the prompts' token ids and the images, which all runs share.

    One process of each machine reads the images; the others have None for their checksum.
    """
    sources, questions = bench.files.sources, bench.files.questions
    return {
        "questions": sources.versions["questions"]["sha256"],
        "prompts": identity.prompts(bench.rows),
        "images": identity.images(sources.image_files(questions)) if ranks.local_rank == 0 else None,
    }


def settings_of(
    settings: Settings, run: Run, bench: Bench, model: dict[str, Any], data: dict[str, str | None]
) -> dict[str, Any]:
    """Return everything that may change an answer.

    Args:
        settings: settings of the evaluation.
        run: method and budget.
        bench: model and questions.
        model: identity of the model, see `identity.of_model`.
        data: checksums of the data, see `checksums`.
    """
    chosen = identity.chosen(settings, bench.task, run)
    if settings.conv_mode is None:  # the checksum of the prompts identifies the template
        del chosen["conv_mode"]
    return {**chosen, **model, **data, "pad": bench.protocol.pad, "batch": settings.batch}


def evaluate(
    settings: Settings,
    progress: Progress = lambda *_: None,
    command: str = "",
    loaded: Any = None,
    task: str = "",
    model: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Run every method at every budget, and write the answers, the official formats and the result of each run.

    Files, settings of earlier answers and images are checked before the first question is asked.

    Args:
        settings: settings of the evaluation.
        progress: called after every batch.
        command: recorded in the results.
        loaded: a loaded model; None to load that of the settings.
        task: benchmark; "" for `settings.task`.
        model: identity of the loaded model, see `identity.of_model`; None to compute it.
        ranks: the processes that evaluate together; None for this process alone.

    Returns:
        The results, the reference first; see `result.make_result`. The list is empty while other chunks are missing,
        and in all processes but the first.

    Raises:
        ValueError: for bad input; the answers so far stay on disk.
        OSError: if the disk is full or not writable.
    """
    ranks = ranks or Ranks()
    bench_task = task_of(settings, task or settings.task)
    with ranks.task(bench_task.name) as shared:
        runs = plan_runs(settings, bench_task)
        files = read_files(bench_task, settings)
        place = find_place(settings, bench_task, files)
        torch.manual_seed(settings.seed)
        bench = prepare(settings, bench_task, files, runs, loaded)
        model = model or identity.of_model(bench.loaded, settings.model, settings.model_base)
        data = checksums(bench, ranks)
        wanted = [settings_of(settings, run, bench, model, data) for run in runs]
        if shared.first:
            origin = origins(settings, bench_task)
            place.find_folders(settings, runs, wanted)
            check_first(place, runs, wanted, bench, settings.restart)
        with opened(bench, place, runs, wanted, shared, settings.restart) as work:
            answer_all(bench, work, runs, progress, model_id(settings.model))
            if shared.first:
                work.wait(progress)
                return finish_all(bench, work, place, shared, command, origin)
        shared.leave()
    return []


def answer_all(bench: Bench, work: Work, runs: Sequence[Run], progress: Progress, name: str) -> None:
    """Answer this process's share of the questions; see `Work.do`."""
    work.report(progress)
    with (
        bench.feed,
        bench.loaded.remember_images([r.method for r in runs]) as bench.images,
        tower_clock(bench),
        watched(bench.loaded) as bench.logits,
    ):
        work.do(progress, name)


def finish_all(
    bench: Bench, work: Work, place: Place, shared: SharedTask, command: str, origin: Callable[[Run], Origin]
) -> list[dict[str, Any]]:
    """Write answer files and results of all runs from the answers of all processes; return the results."""
    results: list[dict[str, Any]] = []
    for run, answers in collected(work, shared.errors()):
        folder, rows, seconds = place.folder(run), answers.finish(), answers.seconds
        with locked(folder) if place.stem else contextlib.nullcontext():  # only one chunk at a time joins and scores
            if place.stem:
                if not merge(folder, place.count, place.stem):
                    continue
                rows = read_finished(folder / ANSWERS, place.everything, answers.settings)
                seconds = total_seconds(folder / TIMING)
            results.append(finish(bench, run, folder, rows, answers.settings, seconds, command, results, origin(run)))
    return results


def check_first(place: Place, runs: Sequence[Run], wanted: Sequence[Any], bench: Bench, restart: bool) -> None:
    """Check earlier answers and decode all images, so that errors are found before anything is computed.

    Raises:
        ValueError: see `Answers`, and for an image that cannot be read.
    """
    complete = not restart
    for run, values in zip(runs, wanted, strict=True):
        if restart or not place.folder(run).is_dir():
            complete = False
            continue
        with place.open(run, values, bench.batch, False) as answers:
            complete = complete and answers.complete
    if not complete:
        open_images(bench.files.questions, bench.files.sources)


def finish(
    bench: Bench,
    run: Run,
    folder: Path,
    rows: Sequence[Row],
    settings: Any,
    seconds: dict[str, float],
    command: str,
    before: Sequence[dict[str, Any]],
    origin: Origin,
) -> dict[str, Any]:
    """Score a complete run, write its official formats, scores and result unless they exist, and return the result.

    Args:
        bench: model and questions.
        run: method and budget.
        folder: folder of the run.
        rows: rows of the answer file.
        settings: settings of the answers.
        seconds: stage -> seconds, summed over processes.
        command: recorded in the result.
        before: results of the runs so far; the run is compared with the first one if that is the reference.
        origin: origin of the run, see `finished.origins`.
    """
    start, scorer = time.perf_counter(), bench.task.scorer
    score = scorer.score(rows, bench.files.labels, bench.files.questions)
    seconds = {"load": bench.load, **seconds, "score": time.perf_counter() - start}
    text = [sum(i != IMAGE_ID for i in r) for r in bench.rows]
    geometry = bench.loaded.geometry
    if bench.protocol.padded is not None:
        geometry = dataclasses.replace(geometry, padded=bench.protocol.padded)
    facts = Facts(bench.task.name, bench.task.figure, bench.loaded.size, geometry, settings)
    scores, units = score_rows(rows, score["questions"]), None
    if score["figure"] is not None and not score.get("scores") and hasattr(scorer, "units"):
        units = scorer.units(rows, scores)
    result = make_result(facts, run.label, score, rows, text, seconds, units)
    cls, preset = resolve(run.name)
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items()} | preset
    result |= {"defaults": json_values(defaults), "files": bench.files.sources.versions, "command": command}
    compare(result, before[0] if before and before[0]["method"] == REFERENCE else None)
    stored, gap = stored_result(folder, origin["stamp"]), result.get("difference_to_full")
    if stored is not None and (gap is None or stored.get("difference_to_full") == gap):
        return {**result, **stored}
    exports = scorer.export(rows, bench.files.labels, folder, run.label) if hasattr(scorer, "export") else []
    write_whole(folder / SCORES, dump_scores(scores))
    result |= {**origin, "made": made(folder, exports)}
    write_whole(folder / RESULT, dump(result))
    return result


def finished(settings: Settings) -> dict[str, list[dict[str, Any]]] | None:
    """Return the results of an evaluation by benchmark if all of them exist already, else None. No model is loaded.

    A chunk is finished if the whole benchmark is.

    Raises:
        ValueError: for unknown benchmarks, methods or hyper-parameters, or a chunk out of range.
    """
    if settings.restart:
        return None
    out = {}
    for name in tasks_of(settings):
        task = task_of(settings, name)
        origin, runs, folder = origins(settings, task), plan_runs(settings, task), out_folder(settings, name)
        found = []
        for run in runs:
            places = folders_of(settings, folder, run.label, identity.chosen(settings, task, run))
            found += list(filter(None, (stored_result(place, origin(run)["stamp"]) for place in places)))[:1]
        if len(found) < len(runs) or not _compared(found):
            return None
        chunk_of(found[0]["rows"], settings.num_chunks, settings.chunk_idx)
        out[name] = found
    return out


def _compared(results: Sequence[dict[str, Any]]) -> bool:
    """Return whether every result has its difference to the reference, if the first result is the reference."""
    first = results[0]
    if first["method"] != REFERENCE or first["figure"] is None:
        return True
    return all("difference_to_full" in r for r in results[1:] if r["figure"] is not None)


def evaluate_all(
    settings: Settings, progress: Callable[[str], Progress], command: str = "", ranks: Ranks | None = None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Run several benchmarks with one loaded model; a failure of one does not stop the others.

    Args:
        settings: settings of the evaluation; see `tasks_of`.
        progress: returns the progress callback of a benchmark.
        command: recorded in the results.
        ranks: the processes that evaluate together; None for this process alone.

    Returns:
        (results by benchmark, messages of the benchmarks that failed).

    Raises:
        ValueError: if the only benchmark fails or the model cannot be loaded.
    """
    ranks = ranks or Ranks()
    settings = dataclasses.replace(settings, device=ranks.device(settings.device))
    names = _agreed_tasks(settings, ranks)
    if settings.task == names[0]:
        return {names[0]: evaluate(settings, progress(names[0]), command, task=names[0], ranks=ranks)}, {}
    plan_runs(settings)  # raises before the model is loaded
    failed = _unreadable(names, settings) if ranks.first else {}
    loaded = load_model(settings)
    model = identity.of_model(loaded, settings.model, settings.model_base)
    results = {}
    for name in names:
        try:
            if name in failed:
                with ranks.task(name):  # reports the error to the other processes
                    raise ValueError(failed[name])
            results[name] = evaluate(settings, progress(name), command, loaded, name, model, ranks)
        except ValueError as error:
            failed[name] = str(error)
    return results, failed


def _agreed_tasks(settings: Settings, ranks: Ranks) -> list[str]:
    """Return the benchmarks that the first process finds, in every process.

    Raises:
        ValueError: see `tasks_of`.
    """
    with ranks.task("benchmarks") as shared:
        if shared.first:
            shared.publish({"names": tasks_of(settings)})
        names: list[str] = shared.receive()["names"]
    return names


def _unreadable(names: Sequence[str], settings: Settings) -> dict[str, str]:
    """Return the messages of benchmarks whose files are missing or broken."""
    failed = {}
    for name in names:
        try:
            read_files(load_task(name), settings)
        except ValueError as error:
            failed[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    return failed
