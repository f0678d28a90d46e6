"""`llava-prune score` and `llava-prune data`, which load no model."""

from __future__ import annotations

import argparse

from ..console import emit, print_table, stderr, stdout
from .data import download, inspect
from .score import score_files
from .show import Bars, data_table, score_table
from .task import load_task, task_names


def score(args: argparse.Namespace) -> int:
    """Run `llava-prune score` and return its exit status.

    Raises:
        ValueError: for bad input, or if the answers have no figure; the other details are printed before.
    """
    result, written, warnings = score_files(
        args.task, args.answers, args.data, args.questions, args.annotations, args.export
    )
    err = stderr()
    for text in warnings:
        err.print(f"note: {text}", markup=False, soft_wrap=True)
    if written:
        err.print(f"for the official tools: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    if args.json and result["details"]:
        emit({k: result[k] for k in ("bench", "figure", "details", "rows", "versions")})
    elif result["details"]:
        print_table(stdout(), score_table(result))
    if result["figure"] is None:
        raise ValueError(result["why"])
    return 0


def data(args: argparse.Namespace) -> int:
    """Run `llava-prune data` and return its exit status: 1 if a file is missing.

    Raises:
        ValueError: for bad input.
    """
    names = task_names() if args.task == "all" else [load_task(args.task).name]
    by_hand: list[str] = []
    if args.download:
        with Bars(stderr(), "MB") as bars:
            for name in names:
                left = download(load_task(name), args.data, lambda u, n, t: bars(u, n >> 20, (t or n) >> 20))[1]
                by_hand += [f"{name}: {kind}" for kind in left]
    reports = [inspect(name, args.data) for name in names]
    if args.json:
        emit(reports)
    else:
        console = stdout()
        for report in reports:
            print_table(console, data_table(report), ("release",))
            for file in report["files"]:
                place = file["path"] or "missing"
                origin = f"{file['source']}, {file['url']}" + (" (--download)" if file["direct"] else "")
                text = f"{file['kind']}: {place}\n  from {origin}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            for problem in report["problems"]:
                console.print(f"{report['bench']}: {problem}", markup=False, soft_wrap=True)
        if by_hand:
            console.print(f"published on a web page only: {'; '.join(by_hand)}", markup=False, soft_wrap=True)
    return 0 if all(r["complete"] for r in reports) else 1
