"""Folders of finished runs, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_prune.report.store import StoredRun

SHORT = "Answer the question using a single word or phrase."
Asked = Sequence[tuple[str, str, float | None]]
"""Question, answer and score of every question of a run."""


COUNTING = ("with_text", "entering")
"""The FLOPs counting that figures show; runs have another number for the other countings."""


DEFAULTS = {"lam": 0.3, "k0": 0.4, "gamma": 0.2, "x0": None, "budget": "after", "strict": True}
"""Defaults of the hyper-parameters of all runs."""


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
        folder: folder to write.
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
        "defaults": DEFAULTS,
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


def make_run(
    folder: Path,
    asked: Asked = (("Is it?", "yes", 1.0),),
    bench: str = "gqa",
    method: str = "full",
    tokens: int | None = None,
    kinds: Sequence[str | None] = ("query", "verify"),
    **more: Any,
) -> Path:
    """Write a run with answers and scores; `more` replaces entries of the result.

    The types of the questions cycle through `kinds`.
    """
    values = [s for _, _, s in asked if s is not None]
    figure = 100 * sum(values) / len(values) if values else None
    rows = list(enumerate(asked))
    answers = [{"question_id": str(i), "prompt": f"{q}\n{SHORT}", "text": text} for i, (q, text, _) in rows]
    scores = [{"question_id": str(i), "score": s, "type": kinds[i % len(kinds)]} for i, (_, _, s) in rows]
    run = write_run(
        folder,
        method,
        tokens,
        figure,
        (10.0, 90.0),
        bench=bench,
        leaving=float(tokens or 576),
        entering=(576.0,),
        questions=len(asked),
        answers=answers,
        scores=scores,
    )
    share = {"tflops": 0.5, "percent_of_full": 100.0 if tokens is None else 25.0}
    flops = dict.fromkeys(run.result["flops"], share)
    seconds = {"load": 100.0, "generate": 2.0, "tower": 1.0}
    result = {**run.result, "flops": flops, "seconds": seconds, **more}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Write five runs of two benchmarks, two models and three methods; return their folder."""
    out = tmp_path / "out"
    hyper = {"model": "models/llava-tiny", "hyper": {"tokens": 64, "lam": 0.3, "layers": [1, 2]}}
    gap = {"points": -5.0, "low": -9.0, "high": 1.0}
    make_run(out / "gqa" / "llava-tiny" / "full")
    make_run(
        out / "gqa" / "llava-tiny" / "autoprune-64",
        method="autoprune",
        tokens=64,
        settings=hyper,
        difference_to_full=gap,
    )
    make_run(out / "gqa" / "llava-tiny" / "random-128", method="random", tokens=128)
    make_run(out / "gqa" / "other" / "full", settings={"model": "lab/other/checkpoint-7", "hyper": {}, "limit": 1})
    make_run(out / "pope" / "llava-tiny" / "full", bench="pope", figure=None, interval=None)
    return out


@pytest.fixture
def runs() -> Callable[..., Path]:
    """Return `make_run`."""
    return make_run
