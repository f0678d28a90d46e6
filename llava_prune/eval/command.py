"""`llava-prune eval`: plan the runs, start the processes, evaluate and report."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shlex
import time
from collections.abc import Callable
from typing import Any

import torch

from ..arguments import TINY
from ..console import emit, print_table, print_whole, stderr, stdout
from ..ops.counts import FlopsShare
from ..report.store import model_path
from .forecast import forecast, forecast_table
from .launch import cores, launch, process_count
from .place import out_folder
from .plan import Settings, model_defaults
from .ranks import Ranks
from .result import without_scores
from .run import evaluate_all, finished
from .show import Bars, results_table, summary_table
from .task import load_task

DEFAULT = [64]
"""Budgets if none are given."""
Show = Callable[[dict[str, list[dict[str, Any]]], dict[str, str]], None]
"""Prints the results by benchmark. It also receives the messages of benchmarks that failed, which are printed
afterwards.
"""


def evaluate(args: argparse.Namespace) -> int:
    """Run `llava-prune eval` and return its exit status.

    Raises:
        ValueError: for bad input, or benchmarks that failed.
    """
    if args.flops and args.tokens:
        raise ValueError("TOKENS and FLOPS are both given; give one of them")
    budgets = args.flops or args.tokens or DEFAULT
    settings = settings_of(args, methods=args.method, tokens=budgets, reference=not args.no_reference)
    return evaluate_settings(args, settings, functools.partial(_show_results, args, settings))


def settings_of(args: argparse.Namespace, **given: Any) -> Settings:
    """Return the settings of an evaluation: those of the command line, overridden by `given`."""
    fields = {f.name for f in dataclasses.fields(Settings)}
    found = {k: v for k, v in vars(args).items() if k in fields} | given
    models = {k: model_path(v) for k, v in found.items() if k in ("model", "model_base") and v}
    return Settings(**{**found, **models})


def evaluate_settings(args: argparse.Namespace, settings: Settings, show: Show) -> int:
    """Evaluate in as many processes as `args` ask for; the first process shows the results. Return the exit status.

    If every run is finished already, no model is loaded. With --dry-run, only the planned work is shown.

    Raises:
        ValueError: for bad input, or benchmarks that failed.
    """
    if args.dry_run:
        return _dry_run(args, settings)
    if args.rate is not None:
        raise ValueError(f"--rate {args.rate:g} needs --dry-run")
    if "RANK" in os.environ:  # started by torchrun, or by `launch`
        return _one_process(args, settings, show)
    done = finished(settings)
    if done is not None:
        show(done, {})
        return _status(_without_figure(done))
    count = _processes(args, settings)
    return launch(count, args.argv, args.max_restarts) if count > 1 else _one_process(args, settings, show)


def _processes(args: argparse.Namespace, settings: Settings) -> int:
    """Return the number of processes to start.

    Commands of many runs use every core for the miniature model, which is fastest.
    """
    count = process_count(args.gpus, args.procs, bool(args.device or args.device_map))
    chosen = args.gpus or args.procs or args.device or args.device_map or settings.engine
    alone = chosen or torch.cuda.is_available() or os.path.normpath(args.model) != TINY
    return count if alone or not args.many_runs else cores()


def _dry_run(args: argparse.Namespace, settings: Settings) -> int:
    count = args.gpus or args.procs or _processes(args, settings)
    count = 1 if settings.engine else count  # all processes answer the same questions
    rows, failed = forecast(settings, count, args.rate)
    if args.json:
        emit(rows)
    else:
        stdout().print(forecast_table(rows, count))
    return _status(failed)


def _without_figure(results: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Return the messages of benchmarks that have a run with NaN or infinite logits."""
    found = ((name, r) for name, runs in results.items() for r in runs)
    return {name: r["why_no_figure"] for name, r in found if r["details"].get("not_finite")}


def _status(failed: dict[str, str]) -> int:
    """Return 0, the exit status if no benchmark failed.

    Raises:
        ValueError: with the messages of the benchmarks that failed.
    """
    if failed:
        raise ValueError("; ".join(f"{name}: {message}" for name, message in failed.items()))
    return 0


def _one_process(args: argparse.Namespace, settings: Settings, show: Show) -> int:
    """Run this process's part of an evaluation and return the exit status; the first process reports."""
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
        show(results, failed)
        return _status(failed | _without_figure(results))
    except ValueError as error:
        if ranks.first_to_report(str(error)):
            raise
        time.sleep(1)  # torchrun ends all processes with this one; the one that prints the message needs time
        return 1


def _show_results(
    args: argparse.Namespace, settings: Settings, results: dict[str, list[dict[str, Any]]], failed: dict[str, str]
) -> None:
    """Print the results as tables or as JSON."""
    if args.json:
        emit([without_scores(r) for runs in results.values() for r in runs])
    else:
        console = stdout()
        for name, runs in results.items():
            task = load_task(name)
            if runs:
                optional = ("seconds", *task.columns, "tokens in/out", "FLOPs %")
                print_table(console, results_table(runs, task.title, task.figure, task.columns), optional)
            else:
                console.print(f"{name}: chunk {args.chunk_idx} of {args.num_chunks} done, other chunks are missing")
            for note in [*task.notes(runs), *dict.fromkeys(r["why_no_figure"] for r in runs if r["why_no_figure"])]:
                console.print(f"{name}: {note}", markup=False, soft_wrap=True)
            console.print(f"answers and results: {out_folder(settings, name)}", markup=False, soft_wrap=True)
        if any(isinstance(budget, FlopsShare) for budget in settings.tokens):
            console.print("FLOPS budgets count visual tokens only; FLOPs % in the table counts the text as well")
        if len(results) > 1:
            print_whole(console, summary_table(results), ("rows", "figure"))
