"""`llava-prune sweep`: evaluate a method under every combination of some hyper-parameters."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import budgets, flops_budgets, load_yaml
from ..console import stderr
from ..methods.planner import REFERENCE, Request
from ..ops.counts import FlopsShare
from ..report import formats
from ..report.accuracy import draw_sweep
from ..report.drawing import save
from ..report.equal_flops import draw_equal_flops, flops_sheet
from ..report.store import StoredRun
from ..report.sweeps import Point, sweep_sheet, sweep_table
from ..report.together import comparable
from .command import evaluate_settings, settings_of
from .plan import Settings
from .resample import ratio_to_full
from .stored import stored_runs
from .task import load_task

KEYS = ("title", "tasks", "methods", "tokens", "flops", "grid", "list", "seeds")
SEED = "seed"


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file.

    Attributes:
        title: heading of the table.
        tasks: benchmarks.
        requests: one request for each combination and seed.
    """

    title: str
    tasks: list[str]
    requests: list[Request]

    @property
    def compares(self) -> bool:
        """Whether methods are compared at equal FLOPs: budgets in FLOPs, several benchmarks, no hyper-parameters."""
        varied = any(name != SEED for r in self.requests for name in r.hyper)
        shares = all(isinstance(b, FlopsShare) for r in self.requests for b in r.budgets)
        return shares and len(self.tasks) > 1 and not varied


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file: YAML with the keys `KEYS`.

    `grid` maps hyper-parameters to lists of values and gives every combination. `list` is a list of combinations, each
    mapping hyper-parameters to one value. `seeds` repeats every combination with several random seeds.

    Raises:
        ValueError: for a missing or broken file, unknown keys or invalid values.
    """
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a sweep file, see docs/ablations.md"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{path}: a sweep is an object with the keys {', '.join(KEYS)}")
    unknown = [str(k) for k in raw if k not in KEYS]
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(KEYS)}")
    try:
        return _sweep(path, raw)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _sweep(path: Path, raw: Mapping[str, Any]) -> Sweep:
    methods = _names(raw.get("methods", ["autoprune"]), "methods")
    tasks = [load_task(name).name for name in dict.fromkeys(_names(raw.get("tasks", ["gqa"]), "tasks"))]
    if "tokens" in raw and "flops" in raw:
        raise ValueError("tokens and flops are both given; a sweep has one of them")
    kind, read = ("flops", flops_budgets) if "flops" in raw else ("tokens", budgets)
    given = read(",".join(_texts(raw.get(kind, [64]), kind)))
    seeds = [{SEED: s} for s in _list(raw["seeds"], "seeds")] if "seeds" in raw else [{}]
    requests = [Request(methods, given, {**hyper, **seed}) for hyper in _combinations(raw) for seed in seeds]
    return Sweep(str(raw.get("title", path.stem)), tasks, requests)


def _combinations(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the hyper-parameters of each point; a single empty one if there is neither a grid nor a list."""
    grid = raw.get("grid") or {}
    if not isinstance(grid, dict):
        raise ValueError(f"grid is {grid!r}; write hyper-parameter: [values]")
    if grid or "list" not in raw:
        values = [_list(v, f"grid.{name}") for name, v in grid.items()]
        for combination in itertools.product(*values):
            yield dict(zip(map(str, grid), combination, strict=True))
    for point in _list(raw["list"], "list") if "list" in raw else []:
        if not isinstance(point, dict):
            raise ValueError(f"list has {point!r}; each entry is an object of hyper-parameter: value")
        yield {str(k): v for k, v in point.items()}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {value!r}; give a list with at least one value")
    return value


def _texts(value: Any, name: str) -> list[str]:
    return [str(v) for v in _list(value, name)]


def _names(value: Any, name: str) -> list[str]:
    return _texts([value] if isinstance(value, str) else value, name)


def sweep(args: argparse.Namespace) -> int:
    """Run `llava-prune sweep` and return its exit status.

    Raises:
        ValueError: for bad input, or benchmarks that failed.
    """
    found = read_sweep(args.file)
    several = f"{','.join(found.tasks)},"  # a list even of one benchmark, so that failures leave empty cells
    settings = settings_of(args, task=several, requests=found.requests)

    def show(results: Mapping[str, Any], failed: Mapping[str, str]) -> None:
        full = stored_runs(settings, [Request([REFERENCE], [1])], found.tasks)[0][0][1]
        points = list(_points(found, settings))
        table = sweep_table(found.title, found.tasks, points, _ratios(found.tasks, full, points))
        formats.show((flops_sheet if found.compares else sweep_sheet)(table), args.format, args.json, table)
        if args.figure:
            runs = [*full.values(), *(run for point in points for task in point.runs.values() for run in task)]
            drawn = draw_equal_flops(table) if found.compares else draw_sweep(comparable(runs))
            for path in save(drawn, Path(args.figure).expanduser()):
                stderr().print(f"figure: {path}", markup=False, highlight=False, soft_wrap=True)

    return evaluate_settings(args, settings, show)


def _ratios(
    tasks: Sequence[str], full: Mapping[str, StoredRun], points: Sequence[Point]
) -> list[dict[str, Any]] | None:
    """Return the mean ratio of each point to the unpruned model; None for a sweep of one benchmark."""
    if len(tasks) == 1:
        return None
    loaded = [load_task(name) for name in tasks]
    return [ratio_to_full(loaded, full, point.runs) for point in points]


def _points(found: Sweep, settings: Settings) -> Iterator[Point]:
    """Return the points of a sweep with their runs; runs that differ only in their seed share a point."""
    points: dict[str, Point] = {}
    names = dict.fromkeys(name for request in found.requests for name in request.hyper if name != SEED)
    single = [Request(r.methods, [budget], r.hyper) for r in found.requests for budget in r.budgets]
    for request, each in zip(single, stored_runs(settings, single, found.tasks), strict=True):
        (budget,) = request.budgets
        for run, runs in each:
            known = run.method.hyper()
            hyper = {k: known[k] for k in names if k in known}
            share = budget.percent if isinstance(budget, FlopsShare) and run.tokens is not None else None
            name = f"{run.name} {run.tokens} {share} {hyper!r}"
            point = points.setdefault(name, Point(run.name, run.tokens, hyper, {}, share))
            for task, stored in runs.items():
                if stored not in point.runs.setdefault(task, []):
                    point.runs[task].append(stored)
    return iter(points.values())
