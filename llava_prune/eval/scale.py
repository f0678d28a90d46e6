"""How long evaluations take on many GPUs: a simulation of the processes, and its check against real runs.

Processes claim pieces from one counter, each one piece ahead of its work (`work.Work`). The first process joins and
scores when the last one has left. The seconds of pieces are those of a real run, or drawn from them.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import arguments
from ..bench.flops import Size, percent_with_text
from ..report.published import read_table, table_names
from .answers import STAGES, TIMING, read_timing
from .pieces import piece_size
from .show import finish

MODULE = "llava_prune.eval.scale"
TEXT = 70
"""Number of text tokens of a prompt in equation (2)."""
QUESTIONS = {
    "gqa": (12578, 398), "sqa": (4241, 2017), "textvqa": (5000, 3166), "pope": (8910, 500), "mme": (2374, 1187),
    "mmbench": (4377, 1176), "mmbench_cn": (4329, 1164), "ocrbench": (1000, 930), "vqav2": (107394, 36807),
}  # fmt: skip
"""Number of questions and images of the published benchmarks."""
SIZES = {"7b": Size(), "13b": Size(layers=40, hidden=5120, intermediate=13824)}


@dataclass(frozen=True)
class Tables:
    """The work of one table of the paper.

    Attributes:
        model: "7b" or "13b".
        tasks: benchmarks.
        budgets: visual tokens of each run.
    """

    model: str
    tasks: tuple[str, ...]
    budgets: tuple[int, ...]


def paper(name: str) -> Tables:
    """Return the runs of a table of the paper; 288 tokens stand for half of the FLOPs."""
    table = read_table(name)
    budgets = (table.baseline.avg_tokens or SIZES["7b"].visual, *(row.avg_tokens or 288 for row in table.rows))
    return Tables(table.model.rpartition("-")[2], tuple(table.tasks), budgets)


PAPER = {int(name): paper(name) for name in table_names() if name.isdigit()}
"""Number of a table of the paper -> its runs."""


# simulation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The processes of a simulation.

    Attributes:
        speeds: speed of each process, relative to the measured process.
        start: seconds until the processes can claim pieces.
        between: seconds of a benchmark in which only the first process works: reading, checking, scoring.
        failures: failures of a process per hour of its work. After a failure all processes start again, and the pieces
            in progress are lost.
    """

    speeds: Sequence[float]
    start: float = 0.0
    between: float = 0.0
    failures: float = 0.0


def makespan(benchmarks: Sequence[Sequence[float]], cluster: Cluster, draw: random.Random) -> float:
    """Simulate an evaluation and return its seconds.

    Args:
        benchmarks: for each benchmark, the seconds of its pieces in order, all runs together.
        cluster: the processes.
        draw: random generator of the failures.
    """
    now = cluster.start
    for pieces in benchmarks:
        now += cluster.between
        left = list(pieces)
        while left:
            alive = draw.expovariate(cluster.failures * len(cluster.speeds) / 3600) if cluster.failures else None
            took, left = _work(left, cluster.speeds, alive)
            now += took + (cluster.start if left else 0.0)
    return now


def _work(pieces: list[float], speeds: Sequence[float], limit: float | None) -> tuple[float, list[float]]:
    """Simulate work until no piece is left or a failure occurs.

    Returns:
        The seconds, at most `limit`, the time of the failure, and the pieces left.
    """
    queue = iter(pieces)
    ahead = [next(queue, None) for _ in speeds]  # the next piece of each process, claimed one piece ahead
    free = [(0.0, rank) for rank in range(len(speeds))]  # a heap of (time at which it is free, process)
    end, begun = 0.0, []
    while free:
        when, rank = heapq.heappop(free)
        piece, ahead[rank] = ahead[rank], next(queue, None)
        if piece is None:
            end = max(end, when)
        elif limit is not None and when + piece / speeds[rank] > limit:
            end = limit
            begun.append(piece)
        else:
            heapq.heappush(free, (when + piece / speeds[rank], rank))
    return end, [*begun, *(p for p in ahead if p is not None), *queue]


# real runs --------------------------------------------------------------------------------------------------------


def _timings(out: Path) -> dict[Path, list[tuple[int, float]]]:
    """Return the folder of each run of a finished evaluation -> (piece, seconds) of its answers.

    Raises:
        ValueError: if there is no timing file.
    """
    stages = STAGES.values()
    found = {p.parent: [(r["piece"], sum(r[k] for k in stages)) for r in read_timing(p)] for p in out.rglob(TIMING)}
    if not any(found.values()):
        raise ValueError(f"{out}: no {TIMING} below it; give OUT of a finished evaluation")
    return dict(sorted(found.items()))


def measured(out: Path) -> list[list[float]]:
    """Return the seconds of the pieces of each benchmark of a finished evaluation, all runs together.

    Raises:
        ValueError: if there is no timing file.
    """
    found: dict[Path, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for folder, answers in _timings(out).items():
        for piece, seconds in answers:
            found[folder.parent][piece] += seconds
    return [[seconds for _, seconds in sorted(pieces.items())] for pieces in found.values()]


def spread(out: Path) -> list[float]:
    """Return the seconds of each answer of a finished evaluation, relative to the mean of its run.

    Raises:
        ValueError: see `measured`.
    """
    relative: list[float] = []
    for answers in filter(None, _timings(out).values()):
        mean = statistics.fmean(seconds for _, seconds in answers)
        relative += [seconds / mean for _, seconds in answers]
    return relative


def _timed(argv: Sequence[str], count: int, out: Path, *more: str) -> float:
    """Run an evaluation in `count` processes with one thread each, and return its seconds.

    Raises:
        ValueError: if the evaluation fails.
    """
    command = [sys.executable, "-m", "llava_prune", "eval", *argv, "--out", str(out), "--procs", str(count), *more]
    start = time.perf_counter()
    got = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if got.returncode:
        raise ValueError(f"{' '.join(command[2:])} failed: {got.stderr[-300:]}")
    return time.perf_counter() - start


def check(argv: Sequence[str], counts: Sequence[int], cores: int, repeats: int) -> dict[str, Any]:
    """Run an evaluation in one and in several processes, in turn, and predict the latter from the former.

    The prediction uses the seconds of pieces of the one-process runs. The time in which no process answers is measured
    with the same command and number of processes on the first two questions alone. If there are more processes than
    cores, each process is slower in proportion.

    Args:
        argv: task and flags of `llava-prune eval`.
        counts: numbers of processes.
        cores: number of cores of this machine.
        repeats: number of rounds.

    Returns:
        {"task", "cores", "repeats", "rows"}. A row has processes, seconds, start (seconds with two questions),
        predicted, ratio (predicted over measured seconds), and times (speed-up over one process); medians over rounds.
    """
    took: dict[int, list[float]] = {n: [] for n in (1, *counts)}
    starts: dict[int, list[float]] = {n: [] for n in (1, *counts)}
    alone: list[list[list[float]]] = []
    with tempfile.TemporaryDirectory() as place:
        for _ in range(repeats):
            for count in took:
                out = Path(place) / str(count)
                took[count].append(_timed(argv, count, out, "--restart"))
                starts[count].append(_timed([*argv, "--limit", "2"], count, Path(place) / f"{count}-few", "--restart"))
                if count == 1:
                    alone.append(measured(out))
    one = statistics.median(took[1])
    rows = []
    for count, seconds in took.items():
        start, speed = statistics.median(starts[count]), min(1.0, cores / count)
        cluster = Cluster([speed] * count, start)
        found = statistics.median([makespan(pieces, cluster, random.Random(0)) for pieces in alone])
        real = statistics.median(seconds)
        rows.append({"processes": count, "seconds": real, "start": start, "predicted": found, "ratio": found / real,
                     "times": one / real})  # fmt: skip
    return {"task": argv[0], "cores": cores, "repeats": repeats, "rows": rows}


# the paper's tables -----------------------------------------------------------------------------------------------


def pieces_of(task: str, table: Tables, rate: float, fixed: float, relative: Sequence[float], draw: Any) -> list[float]:
    """Return simulated seconds of the pieces of a published benchmark under all runs of a table.

    Args:
        task: benchmark.
        table: runs of the table.
        rate: answers per second of the unpruned model on one GPU.
        fixed: share of an unpruned answer's time that pruning does not shorten; the rest is proportional to the FLOPs
            by equation (2).
        relative: seconds of answers relative to their mean, to draw from.
        draw: random generator.
    """
    total, images = QUESTIONS[task]
    size = SIZES[table.model]
    shares = [percent_with_text([n] * size.layers, TEXT, size) / 100 for n in table.budgets]
    seconds = sum(fixed + (1 - fixed) * share for share in shares) / rate
    left, group = total, max(1, round(total / images))
    per_piece = max(group, piece_size(total, None) // group * group)
    out = []
    while left > 0:
        some = min(per_piece, left)
        out.append(seconds * sum(draw.choices(relative, k=some)))
        left -= some
    return out


def predict(
    relative: Sequence[float],
    rates: dict[str, float],
    fixed: float,
    cluster: Cluster,
    gpus: Sequence[int],
    slow: float,
) -> dict[str, Any]:
    """Predict the hours of the paper's tables by number of GPUs.

    Args:
        relative: relative seconds of answers, see `spread`.
        rates: model -> answers per second of the unpruned model on one GPU.
        fixed: see `pieces_of`.
        cluster: `start`, `between` and `failures` of the processes; its speeds are not used.
        gpus: numbers of GPUs.
        slow: relative speed of the first GPU; 1 if no GPU is slow.

    Returns:
        {"rates", "fixed", "slow", "start", "between", "failures", "rows"}. A row has table, model, answers, and hours
        (number of GPUs -> hours).
    """
    rows = []
    for number, table in PAPER.items():
        draw = random.Random(number)
        work = [pieces_of(t, table, rates[table.model], fixed, relative, draw) for t in table.tasks]
        hours = {}
        for n in gpus:
            speeds = [slow if n > 1 and rank == 0 else 1.0 for rank in range(n)]
            found = makespan(work, Cluster(speeds, cluster.start, cluster.between, cluster.failures), draw)
            hours[str(n)] = found / 3600
        answers = sum(QUESTIONS[t][0] for t in table.tasks) * len(table.budgets)
        rows.append({"table": number, "model": table.model, "answers": answers, "hours": hours})
    return {"rates": rates, "fixed": fixed, "slow": slow, "start": cluster.start, "between": cluster.between,
            "failures": cluster.failures, "rows": rows}  # fmt: skip


# command line -----------------------------------------------------------------------------------------------------


def _check_table(result: dict[str, Any]) -> Table:
    title = f"{result['task']}: {result['repeats']} rounds on {result['cores']} cores, one thread a process"
    out = Table(title=title)
    names = {"processes": "processes", "seconds": "seconds", "start": "two questions, seconds"}
    names |= {"predicted": "predicted", "ratio": "predicted / measured", "times": "x one process"}
    for name in names.values():
        out.add_column(name, justify="right")
    for r in result["rows"]:
        out.add_row(str(r["processes"]), *(f"{r[k]:.2f}" for k in list(names)[1:]))
    return out


def _tables_table(result: dict[str, Any]) -> Table:
    rates = ", ".join(f"{k} {v:g}" for k, v in result["rates"].items())
    text = f"predicted, not measured: {rates} answers/s a GPU unpruned, {100 * result['fixed']:g} % of it not shortened"
    out = Table(title="hours for the paper's tables by number of GPUs", caption=text)
    gpus = list(result["rows"][0]["hours"])
    for name in ("table", "model", "answers", *gpus):
        out.add_column(name, justify="right")
    for r in result["rows"]:
        hours = (f"{h:.2f}" if h < 10 else f"{h:.1f}" for h in r["hours"].values())
        out.add_row(str(r["table"]), r["model"], f"{r['answers']:,}", *hours)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=MODULE, description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="run an evaluation in several processes and compare with the simulation")
    p.add_argument("task", help="benchmark, or a list")
    p.add_argument("--procs", type=arguments.counts, default=[2, 4], help="numbers of processes (default 2,4)")
    p.add_argument("--repeats", type=arguments.positive, default=3, help="rounds (default 3)")
    p.add_argument("--cores", type=arguments.positive, default=os.cpu_count() or 1, help="cores (default all)")
    p.add_argument("--limit", type=arguments.positive, help="evaluate the first LIMIT questions only")
    q = commands.add_parser("tables", help="predict the hours of the paper's tables")
    q.add_argument("timed", type=Path, help="OUT of a finished evaluation, whose answers' times are drawn from")
    q.add_argument("--gpus", type=arguments.counts, default=[1, 2, 4, 8, 16, 32, 64], help="numbers of GPUs")
    number = arguments.number
    q.add_argument("--rate-7b", type=number(1e-3, 1e6), required=True, help="unpruned answers per second of a GPU")
    q.add_argument("--rate-13b", type=number(1e-3, 1e6), required=True, help="the same for LLaVA-1.5-13B")
    text = "share of an answer's time that pruning does not shorten (default 0.3)"
    q.add_argument("--fixed", type=number(0, 1), default=0.3, help=text)
    q.add_argument("--start", type=number(0, 1e5), default=60.0, help="seconds until the model is loaded (default 60)")
    q.add_argument(
        "--between", type=number(0, 1e5), default=30.0, help="seconds of a benchmark before and after answering"
    )
    q.add_argument("--failures", type=number(0, 1e3), default=0.0, help="failures of a process in an hour (default 0)")
    q.add_argument("--slow", type=number(1e-3, 1), default=1.0, help="speed of one GPU among them (default 1)")
    for some in (p, q):
        some.add_argument("--out", type=Path, default=None, help="JSON file for the result")
        some.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")
    args = parser.parse_args(argv)
    if args.command == "check":
        given = [args.task, *([] if args.limit is None else [f"--limit={args.limit}"])]
        measure = lambda: check(given, args.procs, args.cores, args.repeats)  # noqa: E731
        return finish(MODULE, argv, measure, _check_table, args.out, args.json)
    rates = {"7b": args.rate_7b, "13b": args.rate_13b}
    cluster = Cluster((), args.start, args.between, args.failures)
    made = lambda: predict(spread(args.timed), rates, args.fixed, cluster, args.gpus, args.slow)  # noqa: E731
    return finish(MODULE, argv, made, _tables_table, args.out, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
