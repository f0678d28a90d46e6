"""`llava-prune eval`: plan, start the processes, evaluate, report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import time
from typing import Any

from ..console import emit, stderr, stdout
from .forecast import forecast, forecast_table
from .launch import launch, process_count
from .place import out_folder
from .plan import Settings, model_defaults
from .ranks import Ranks
from .result import public
from .run import evaluate_all, finished
from .show import Bars, results_table, summary_table
from .task import load_task


def evaluate(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ValueError: for bad input, or benchmarks that failed.
    """
    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in fields}
    settings = Settings(**given, methods=args.method, reference=not args.no_reference)
    if args.dry_run:
        return _dry_run(args, settings)
    if args.rate is not None:
        raise ValueError(f"--rate {args.rate:g} is for --dry-run")
    if "RANK" in os.environ:  # started by torchrun, or by `launch`
        return _one_process(args, settings)
    done = finished(settings)
    if done is not None:
        return _show_results(args, settings, done, {})
    count = process_count(args.gpus, args.procs, bool(args.device or args.device_map))
    return launch(count, args.argv, args.max_restarts) if count > 1 else _one_process(args, settings)


def _dry_run(args: argparse.Namespace, settings: Settings) -> int:
    count = args.gpus or args.procs or process_count(None, None, bool(args.device or args.device_map))
    count = 1 if settings.engine else count  # all processes answer the same questions
    rows, failed = forecast(settings, count, args.rate)
    if args.json:
        emit(rows)
    else:
        stdout().print(forecast_table(rows, count))
    return _status(failed)


def _status(failed: dict[str, str]) -> int:
    """0 where no benchmark failed.

    Raises:
        ValueError: with the messages of those that did.
    """
    if failed:
        raise ValueError("; ".join(f"{name}: {message}" for name, message in failed.items()))
    return 0


def _one_process(args: argparse.Namespace, settings: Settings) -> int:
    """This process's part of an evaluation; the first one reports."""
    err = stderr()
    ranks = Ranks.of(os.environ, settings.engine is not None)
    command = shlex.join(["llava-prune", *args.argv])
    try:
        if settings.data == "" or settings.model == "":
            raise ValueError("MODEL and DATA must not be empty")
        defaults = model_defaults(settings.model)
        if not ranks.first:
            evaluate_all(settings, lambda _: lambda *_: None, command, ranks)
            return 0
        if defaults:
            err.print(f"hyper-parameters from {settings.model}: {json.dumps(defaults)}", markup=False, soft_wrap=True)
        with Bars(err) as bars:
            results, failed = evaluate_all(settings, bars.of, command, ranks)
        return _show_results(args, settings, results, failed)
    except ValueError as error:
        if ranks.speaks(str(error)):
            raise
        time.sleep(1)  # the end of this process ends the one that prints the message
        return 1


def _show_results(args: argparse.Namespace, settings: Settings, results: dict[str, Any], failed: dict[str, str]) -> int:
    """Print the results, or their JSON.

    Raises:
        ValueError: for benchmarks that failed.
    """
    if args.json:
        emit([public(r) for runs in results.values() for r in runs])
    else:
        console = stdout()
        for name, runs in results.items():
            task = load_task(name)
            if runs:
                console.print(results_table(runs, task.title, task.figure, task.columns))
            else:
                console.print(f"{name}: chunk {args.chunk_idx} of {args.num_chunks} done, other chunks are missing")
            for note in [*task.notes(runs), *dict.fromkeys(r["why_no_figure"] for r in runs if r["why_no_figure"])]:
                console.print(f"{name}: {note}", markup=False, soft_wrap=True)
            console.print(f"answers and results: {out_folder(settings, name)}", markup=False, soft_wrap=True)
        if len(results) > 1:
            console.print(summary_table(results))
    failed |= {n: r["why_no_figure"] for n, runs in results.items() for r in runs if r["details"].get("not_finite")}
    return _status(failed)
