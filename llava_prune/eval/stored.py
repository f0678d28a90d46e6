"""Runs of the store that answer a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..methods.planner import Request, Run
from ..report.store import StoredRun, read_result
from . import identity
from .answers import RESULT
from .place import folders_of, out_folder
from .plan import Settings, plan_runs
from .run import task_of


def stored_runs(settings: Settings, request: Request, tasks: Sequence[str]) -> list[tuple[Run, dict[str, StoredRun]]]:
    """The runs of a request, each with the newest finished one of the store on every benchmark that has one.

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
        for run in plan_runs(alone, task):
            now, place = identity.chosen(settings, task, run), out_folder(settings, name)
            found = [f for f in folders_of(settings, place, run.label, now) if (f / RESULT).is_file()]
            _, runs = out.setdefault(run.label, (run, {}))
            if found:
                newest = max(found, key=lambda f: (f / RESULT).stat().st_mtime)
                runs[name] = StoredRun(newest, read_result(newest / RESULT))
    return list(out.values())
