"""Forecast of an evaluation (`--dry-run`): its runs, the answers that exist already, and the time for the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.table import Table

from ..methods.planner import Run
from .answers import ANSWERS, SETTINGS, STAGES, TIMING, difference, named, total_seconds
from .identity import chosen
from .place import Place, chunk_of, folders_of, out_folder
from .plan import Settings, plan_runs
from .run import read_files, task_of, tasks_of
from .task import Task


def forecast(
    settings: Settings, processes: int, rate: float | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Inspect the files of an evaluation without loading the model.

    Args:
        settings: settings of the evaluation.
        processes: number of processes.
        rate: answers per second of a process; None for the rate of the existing answers.

    Returns:
        (rows, failed). `rows` has one entry for each run: bench, label, questions, answered, left, rate (None if
        nothing was measured), seconds (time with all processes working; None without a rate), folder, and note (None,
        or why earlier answers do not count). `failed` has the messages of benchmarks whose files are missing or broken.

    Raises:
        ValueError: for unknown benchmarks, methods or hyper-parameters.
    """
    rows, failed = [], {}
    for name in tasks_of(settings):
        task = task_of(settings, name)
        runs = plan_runs(settings, task)
        try:
            questions = read_files(task, settings).questions
        except ValueError as error:
            failed[name] = str(error)
            continue
        total = len(chunk_of(len(questions), settings.num_chunks, settings.chunk_idx))
        rows += [_row(settings, task, run, total, processes, rate) for run in runs]
    return rows, failed


def _row(settings: Settings, task: Task, run: Run, total: int, processes: int, rate: float | None) -> dict[str, Any]:
    """Return the row of one run, see `forecast`."""
    out, now = out_folder(settings, task.name), chosen(settings, task, run)
    folder = next(folders_of(settings, out, run.label, now), out / run.label)
    stem = Place.stem_of(settings.num_chunks, settings.chunk_idx)
    note = None if settings.restart else _conflict(folder / named(SETTINGS, stem), now)
    if note is not None:
        note = f"refused: the answers in OUT were {note}" if settings.out else f"anew: other answers were {note}"
    answered, measured = (0, None) if settings.restart or note else _found(folder, stem)
    per_second = rate if rate is not None else measured
    left = max(0, total - answered)
    return {
        "bench": task.name,
        "label": run.label,
        "questions": total,
        "answered": answered,
        "left": left,
        "rate": per_second,
        "seconds": left / per_second / processes if per_second else (0.0 if left == 0 else None),
        "folder": str(folder),
        "note": note,
    }


def _conflict(path: Path, now: Mapping[str, Any]) -> str | None:
    """Describe how the settings of earlier answers differ, as far as known without a model; None if they agree."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return difference({k: stored.get(k) for k in now}, now) if isinstance(stored, dict) else None


def _found(folder: Path, stem: str) -> tuple[int, float | None]:
    """Return the number of answers of a run, and the answers per second of one process (None if unknown)."""
    final = folder / named(ANSWERS, stem)
    if final.is_file():
        count = sum(1 for line in final.read_bytes().splitlines() if line.strip())
        return count, _rate(count, sum(total_seconds(folder / named(TIMING, stem)).values()))
    rows: dict[int, float] = {}
    for path in folder.glob(named("answers*.partial.jsonl", stem)):
        for line in path.read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                rows[int(row["row"])] = sum(float(row[k]) for k in STAGES.values())
    return len(rows), _rate(len(rows), sum(rows.values()))


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None


def forecast_table(rows: Sequence[Mapping[str, Any]], processes: int) -> Table:
    """Return the rows of `forecast` and their sum as a table."""
    plural = "process" if processes == 1 else "processes"
    caption = f"time of {processes} {plural}, at the answers per second of one process; without loading the model"
    table = Table(title="what would run", caption=caption)
    for name in ("benchmark", "run", "questions", "answered", "left", "answers/s", "time", "note"):
        table.add_column(name, justify="left" if name in ("benchmark", "run", "note") else "right", overflow="fold")
    for r in rows:
        numbers = (str(r[k]) for k in ("questions", "answered", "left"))
        rate = "-" if r["rate"] is None else f"{r['rate']:.2f}"
        table.add_row(r["bench"], r["label"], *numbers, rate, _time(r["seconds"]), r["note"] or "")
    if len(rows) > 1:
        seconds = None if any(r["seconds"] is None for r in rows) else sum(r["seconds"] for r in rows)
        sums = (str(sum(r[k] for r in rows)) for k in ("questions", "answered", "left"))
        table.add_section()
        table.add_row("all", "", *sums, "", _time(seconds), "")
    return table


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
