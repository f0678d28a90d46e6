"""Questions and answers of the runs of a benchmark, stored by column, for the question browser of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .compare import check_same, questions, scored
from .store import UNPRUNED, StoredRun
from .together import bench_name


def columns(runs: Sequence[StoredRun]) -> tuple[dict[str, Any] | None, list[StoredRun], list[str]]:
    """Return the questions of a benchmark and the answers of each run.

    Args:
        runs: finished runs of one benchmark.

    Returns:
        Columns with an entry for each question (None if every run is left out), the runs that they contain, and the
        reasons why other runs are left out.

        - `bench`, `title`: name of the benchmark, in files and for readers.
        - `ids`, `questions`: question ids, and question texts as in `Pair.prompt`.
        - `types`, `type`: names of types, and for each question an index into them or None.
        - `texts`: every distinct answer of any run.
        - `runs`: name, folder, `pruned`, and the columns `answers` (indices into `texts`) and `scores` (0..1 or None).
    """
    shown: list[dict[str, Any]] = []
    readable: list[StoredRun] = []
    left_out: list[str] = []
    texts: dict[str, int] = {}
    first: tuple[StoredRun, list[dict[str, Any]], list[Any]] | None = None
    for run in runs:
        try:
            rows = run.answers()
            same, other = (run, rows) if first is None else first[:2]
            check_same(same, run, other, rows)
            scores = scored(run, rows)
        except ValueError as error:
            left_out.append(str(error))
            continue
        if first is None:
            first = run, rows, [s["type"] for s in scores]
        readable.append(run)
        shown.append(
            {
                "name": run.name,
                "folder": str(run.folder),
                "pruned": run.method != UNPRUNED,
                "answers": [texts.setdefault(row["text"], len(texts)) for row in rows],
                "scores": [_short(s["score"]) for s in scores],
            }
        )
    if first is None:
        return None, [], left_out
    run, rows, kinds = first
    types = sorted({k for k in kinds if k is not None})
    return (
        {
            "bench": run.bench,
            "title": bench_name(run.bench),
            "ids": [row["question_id"] for row in rows],
            "questions": questions([row["prompt"] for row in rows]),
            "types": types,
            "type": [None if k is None else types.index(k) for k in kinds],
            "texts": list(texts),
            "runs": shown,
        },
        readable,
        left_out,
    )


def _short(score: float | None) -> float | None:
    """Return a score in its shortest JSON form: 1 and 0 without decimals."""
    return score if score is None or score != int(score) else int(score)
