"""Folders of finished runs, written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_prune.report.store import StoredRun

COUNTING = ("with_text", "entering")
"""The counting of figures; the others get another number."""


def write_run(
    folder: Path,
    method: str = "autoprune",
    tokens: int | None = 64,
    figure: float | None = 90.0,
    interval: tuple[float, float] | None = None,
    *,
    bench: str = "gqa",
    model: str = "models/llava-tiny",
    hyper: dict[str, Any] | None = None,
    percent: float = 20.0,
    leaving: float = 64.0,
    entering: Sequence[float] = (576, 144, 72),
    questions: int = 4,
    answers: Sequence[dict[str, Any]] | None = None,
    scores: Sequence[dict[str, Any]] | None = None,
) -> StoredRun:
    """Write the folder of a finished run, with the fields that reports read.

    Args:
        folder: where.
        method, tokens, figure, interval, bench, model: see StoredRun.
        hyper: hyper-parameters besides the budget.
        percent: FLOPs in percent of the unpruned model's.
        leaving: average visual tokens leaving a layer.
        entering: mean visual tokens entering each layer, of 576.
        questions: number of questions.
        answers, scores: rows of these files; None writes no file.
    """
    folder.mkdir(parents=True)
    budget = {} if tokens is None else {"tokens": tokens}
    result = {
        "bench": bench,
        "label": method if tokens is None else f"{method}-{tokens}",
        "method": method,
        "budget": tokens,
        "figure": figure,
        "figure_name": "accuracy",
        "interval": interval,
        "rows": questions,
        "visual_tokens": {
            "unpruned": 576,
            "average_entering": sum(entering) / len(entering),
            "entering_by_layer": list(entering),
            "average_leaving": leaving,
        },
        "flops": {
            f"{what}_{way}": {"percent_of_full": percent if (what, way) == COUNTING else 1.0}
            for what in ("visual_only", "with_text")
            for way in ("entering", "leaving")
        },
        "seconds": {"load": 1.0, "generate": 2.0},
        "settings": {"model": model, "hyper": {**budget, **(hyper or {})}},
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    for name, rows in (("answers", answers), ("scores", scores)):
        if rows is not None:
            text = "".join(json.dumps(r) + "\n" for r in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return StoredRun(folder, result)
