"""Runs of the store that answer a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..methods.planner import Request, Run
from ..report.store import StoredRun, read_result
from . import identity
from .answers import RESULT
from .finished import origins
from .place import folders_of, out_folder
from .plan import Settings, plan_runs
from .run import task_of


def stored_runs(settings: Settings, request: Request, tasks: Sequence[str]) -> list[tuple[Run, dict[str, StoredRun]]]:
    """The runs of a request, each with the finished one of the store on every benchmark that has one.

    Model, data, device and precision must be those that `settings` ask for. Of several that differ in weights, files or
    versions of packages, the one that is current counts, or the newest.

    Args:
        settings: of the evaluation; its own requests do not count.
        request: what is looked for.
        tasks: benchmarks.

    Raises:
        ValueError: for a result file that is broken.
    """
    alone = dataclasses.replace(settings, requests=[request], reference=False)
    out: dict[str, tuple[Run, dict[str, StoredRun]]] = {}
    for name in tasks:
        task = task_of(settings, name)
        origin = origins(settings, task)
        for run in plan_runs(alone, task):
            now, place, mine = identity.chosen(settings, task, run), out_folder(settings, name), origin(run)
            paths = [f / RESULT for f in folders_of(settings, place, run.label, now) if (f / RESULT).is_file()]
            found = [StoredRun(path.parent, read_result(path)) for path in paths]
            found = [r for r in found if r.result.get("asked") == mine["asked"]]
            _, runs = out.setdefault(run.label, (run, {}))
            if found:
                runs[name] = max(
                    found, key=lambda r: (r.result["stamp"] == mine["stamp"], (r.folder / RESULT).stat().st_mtime)
                )
    return list(out.values())
