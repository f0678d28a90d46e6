"""`llava-prune bench`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex

from ..console import emit, print_table, stderr, stdout
from ..models.parallel import is_first_process
from ..report.speed import plot
from .show import speed_tables
from .speed import Settings, out_folder, speed

OPTIONAL = ("padding %", "efficiency without overhead", "bound x", "prefill q1-q3", "vision", "prefill MiB")
"""Columns that are left out, in this order, when the terminal is narrow. bench.json has all of them."""


def bench(args: argparse.Namespace) -> int:
    """Run `llava-prune bench` and return its exit status.

    Raises:
        ValueError: for bad input.
    """
    err = stderr()
    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in fields}
    settings = Settings(**given, methods=args.method, batches=args.batch, texts=args.text, memory=not args.no_memory)
    result = speed(settings, lambda what: err.print(what, markup=False), shlex.join(["llava-prune", *args.argv]))
    if not is_first_process():
        return 0
    try:
        plot(result, out_folder(settings) / "bench.png")
    except ValueError as error:
        err.print(f"no plot: {error}", markup=False)
    if args.json:
        emit(result)
        return 0
    console = stdout()
    for table in speed_tables(result):
        print_table(console, table, OPTIONAL)
    console.print(f"results: {out_folder(settings)}", markup=False, soft_wrap=True)
    return 0
