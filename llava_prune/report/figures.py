"""`llava-prune figure`: plots of finished runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import RESULTS
from ..console import stdout
from .accuracy import draw_accuracy_flops, draw_accuracy_tokens, draw_sweep
from .drawing import save
from .speed import draw_speed, read_bench, select_bench
from .store import UNPRUNED, StoredRun, matching, read_runs, select
from .together import comparable
from .tokens import draw_information, draw_retention, draw_survival

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_RUNS: Mapping[str, Callable[[Sequence[StoredRun]], Figure]] = {
    "accuracy-flops": draw_accuracy_flops,
    "accuracy-tokens": draw_accuracy_tokens,
    "retention": draw_retention,
    "information": draw_information,
    "survival": draw_survival,
    "sweep": draw_sweep,
}
"""Name of a figure -> function that draws it from finished runs of an evaluation."""
SPEED = "speed"
"""Name of the figure of speed measurements."""


def draw(args: Namespace) -> int:
    """Run `llava-prune figure`: draw and write a figure, and print the paths of the files.

    Args:
        args: name, runs, task, method, model, tokens and out, see `cli`.

    Returns:
        The exit status.

    Raises:
        ValueError: for no suitable runs, runs of several models, broken files, or if matplotlib is not installed.
    """
    figure = draw_speed(_measurements(args)) if args.name == SPEED else OF_RUNS[args.name](chosen(args, args.runs))
    console = stdout()
    for path in save(figure, Path(args.out or f"{RESULTS}/figures/{args.name}").expanduser()):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def _conditions(args: Namespace) -> dict[str, Any]:
    return {"method": args.method, "model": [args.model] if args.model else [], "tokens": args.tokens}


def _present(places: Sequence[str]) -> list[str]:
    """Return the folders to read, without the default one if it does not exist yet."""
    return [p for p in places if p != RESULTS or Path(p).is_dir()]


def chosen(args: Namespace, places: Sequence[str]) -> list[StoredRun]:
    """Return the runs selected by the command line, with the unpruned model on their benchmarks; see `comparable`.

    Args:
        args: task, method, model, tokens and no_sweeps, see `cli`.
        places: folders of runs, or folders above several runs.

    Raises:
        ValueError: if there are no runs; see also `matching`, `read_runs` and `comparable`.
    """
    asked = _conditions(args)
    found = [r for r in read_runs(_present(places)) if not (args.no_sweeps and r.varied)]
    where = ", ".join(places)
    if not found:
        way_out = "make some with llava-prune eval gqa --method autoprune --tokens 192,128,64"
        raise ValueError(f"no finished runs in {where}; {way_out}")
    runs = matching(found, where, args.task, **asked)
    benches = sorted({r.bench for r in runs})
    unpruned = select(found, bench=benches, method=[UNPRUNED], model=asked["model"])
    return comparable([*runs, *(r for r in unpruned if r not in runs)])


def _measurements(args: Namespace) -> list[dict[str, Any]]:
    """Return the results of `llava-prune bench` selected by the command line."""
    for flag in ("task", "no_sweeps"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} is for runs of benchmarks; measurements have none")
    results = select_bench(read_bench(_present(args.runs)), **_conditions(args))
    if not results:
        raise ValueError(
            f"no matching measurement in {', '.join(args.runs)}; make one with llava-prune bench --tokens 192,128,64"
        )
    return results
