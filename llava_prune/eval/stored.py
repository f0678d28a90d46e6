"""Find the finished runs in the store of results that answer a request."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from ..methods.planner import Request, Run
from ..report.store import StoredRun, read_result
from . import identity
from .answers import RESULT
from .finished import origins
from .place import folders_of, out_folder
from .plan import Settings, plan_runs
from .run import task_of

Found = list[tuple[Run, dict[str, StoredRun]]]
"""Runs, each with its finished runs in the store by benchmark."""


def stored_runs(settings: Settings, requests: Sequence[Request], tasks: Sequence[str]) -> list[Found]:
    """Return the runs of each request, with the finished run in the store on every benchmark that has one.

    Model, data, device and precision must be those requested by `settings`. Of several finished runs that differ in
    weights, files or package versions, the current one is taken, or else the newest.

    Args:
        settings: settings of the evaluation; their own requests are ignored.
        requests: requests to look up.
        tasks: benchmarks.

    Raises:
        ValueError: for a result file that is broken.
    """
    out: list[dict[str, tuple[Run, dict[str, StoredRun]]]] = [{} for _ in requests]
    for name in tasks:
        task = task_of(settings, name)
        origin, place = origins(settings, task), out_folder(settings, name)
        for runs, request in zip(out, requests, strict=True):
            for run in plan_runs(dataclasses.replace(settings, requests=[request], reference=False), task):
                _, found = runs.setdefault(run.label, (run, {}))
                now, mine = identity.chosen(settings, task, run), origin(run)
                paths = [f / RESULT for f in folders_of(settings, place, run.label, now) if (f / RESULT).is_file()]
                stored = [StoredRun(path.parent, read_result(path)) for path in paths]
                alike = [r for r in stored if r.result.get("asked") == mine["asked"]]
                if alike:
                    found[name] = max(alike, key=functools.partial(_rank, mine["stamp"]))
    return [list(runs.values()) for runs in out]


def _rank(stamp: str | None, run: StoredRun) -> tuple[bool, float]:
    """Return a sorting key of finished runs that puts the current one last, after the newest."""
    return run.result["stamp"] == stamp, (run.folder / RESULT).stat().st_mtime
