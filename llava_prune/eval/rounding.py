"""Effect of rounding AutoPrune's slope on a benchmark: number of schedules, kept tokens, answers and score.

python -m llava_prune.eval.rounding --step 0.05 --tokens 192,128,64
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

import llava_prune

from .. import arguments
from ..arguments import DATA, TINY
from ..methods.planner import Run
from .asking import Bench, answer, prepare
from .pieces import all_batches
from .plan import Settings, plan_runs
from .run import read_files
from .show import finish
from .task import load_task

MODULE = "llava_prune.eval.rounding"


@dataclass
class Seen:
    """Answers and kept tokens of one run, by question number.

    Attributes:
        rows: answer rows.
        plans: visual tokens leaving each layer.
        kept: original indices of the visual tokens that leave each layer.
    """

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    plans: dict[int, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[int, list[frozenset[int]]] = field(default_factory=dict)


def watch(bench: Bench, run: Run, **options: Any) -> Seen:
    """Ask every question with an image; return the answers and the kept tokens. `options` are passed to `pruned`."""
    seen = Seen()
    asked = {i: q for i, q in enumerate(bench.files.questions) if q.image is not None}
    with llava_prune.pruned(bench.loaded.model, run.method, **options) as handle:
        for some in all_batches(asked, bench.lengths, bench.batch):
            rows = answer(bench, handle, some, run, bench.task.name)
            record = handle.last
            if record is None or record.tokens_out.shape[0] != len(some):
                raise ValueError(f"out of memory at batch size {len(some)}; give a smaller BATCH")
            kept = record.kept
            for k, (i, row) in enumerate(zip(some, rows, strict=True)):
                seen.rows[i], seen.plans[i] = row, tuple(record.tokens_out[k].tolist())
                seen.kept[i] = [frozenset(x for x in layer[k].tolist() if x >= 0) for layer in kept]
    return seen


def overlap(a: Seen, b: Seen) -> list[float]:
    """Return |A & B| / |A | B| of the kept tokens for each layer, averaged over questions; 1 if both sets are empty."""
    layers = range(len(next(iter(a.kept.values()))))
    return [fmean(_share(a.kept[i][layer], b.kept[i][layer]) for i in a.kept) for layer in layers]


def _share(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def measure(settings: Settings, step: float, loaded: Any = None) -> dict[str, Any]:
    """Compare exact and rounded slopes on the same questions, at every budget.

    Args:
        settings: model, data, budgets, limit, and one method with a `slope_step`.
        step: slopes are rounded to multiples of this number.
        loaded: a loaded model; None to load that of the settings.

    Returns:
        {"step", "questions", "rows"}. A row has the budget, the number of schedules and the figure for "exact" and
        "rounded", the overlap of kept tokens (mean and minimum over layers), and the share of equal answers.

    Raises:
        ValueError: for bad settings, or a method without `slope_step`.
    """
    task = load_task(settings.task)
    exact = plan_runs(replace(settings, reference=False), task)
    given = {**settings.method_args, "slope_step": step}
    rounded = plan_runs(replace(settings, reference=False, method_args=given), task)
    torch.manual_seed(settings.seed)
    bench = prepare(settings, task, read_files(task, settings), exact, loaded)
    rows = []
    with bench.loaded.remember_images([r.method for r in (*exact, *rounded)]) as bench.images:
        for a, b in zip(exact, rounded, strict=True):
            one, two = watch(bench, a), watch(bench, b)
            shares = overlap(one, two)
            same = fmean(one.rows[i]["text"] == two.rows[i]["text"] for i in one.rows)
            rows.append(
                {
                    "method": a.name,
                    "tokens": a.tokens,
                    "schedules": {"exact": len(set(one.plans.values())), "rounded": len(set(two.plans.values()))},
                    "same_schedule": fmean(one.plans[i] == two.plans[i] for i in one.plans),
                    "overlap": {"mean": fmean(shares), "least": min(shares)},
                    "same_answers": same,
                    "figure": {"exact": _figure(bench, one), "rounded": _figure(bench, two)},
                }
            )
    return {"step": step, "model": settings.model, "questions": len(bench.rows), "rows": rows}


def _figure(bench: Bench, seen: Seen) -> float | None:
    rows = [seen.rows[i] for i in sorted(seen.rows)]
    figure: float | None = bench.task.scorer.score(rows, bench.files.labels, bench.files.questions)["figure"]
    return figure


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table."""
    out = Table(
        title=f"slope rounded to steps of {result['step']:g}, {result['questions']} questions",
        caption="overlap: kept tokens of both over kept tokens of either, mean over layers (minimum)",
    )
    for name in ("run", "schedules", "rounded", "overlap, %", "same answers, %", "figure", "figure rounded"):
        out.add_column(name, justify="left" if name == "run" else "right")
    for r in result["rows"]:
        figures = ["-" if v is None else f"{v:.2f}" for v in r["figure"].values()]
        out.add_row(
            f"{r['method']} {r['tokens']}",
            *map(str, r["schedules"].values()),
            f"{100 * r['overlap']['mean']:.1f} ({100 * r['overlap']['least']:.1f})",
            f"{100 * r['same_answers']:.1f}",
            *figures,
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=MODULE, description=(__doc__ or "").splitlines()[0])
    flag = functools.partial(arguments.flag, parser, os.environ)
    flag("step", "0.05", "slopes are rounded to multiples of STEP", type=arguments.number(1e-9, 1))
    flag("task", "gqa", "benchmark")
    flag("model", TINY, "checkpoint folder or hub id, in either format")
    flag("data", DATA, "folder with the benchmark's files")
    flag("method", "autoprune", "autoprune or autoprune-flash", type=arguments.method)
    flag("tokens", "192,128,64", "visual token budget, or a list", type=arguments.counts)
    flag("batch", "8", "batch size", type=arguments.positive)
    flag("limit", None, "evaluate the first LIMIT questions only", type=arguments.positive)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")
    args = parser.parse_args(argv)
    settings = Settings(
        task=args.task,
        model=args.model,
        methods=(args.method,),
        tokens=tuple(args.tokens),
        data=args.data,
        batch=args.batch,
        limit=args.limit,
    )
    return finish(MODULE, argv, lambda: measure(settings, args.step), table, args.out, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
