"""The settings of an evaluation, and the runs that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import DATA, TINY
from ..methods.planner import Run, plan

MODEL_DEFAULTS = "llava_prune.json"
"""File of a checkpoint that states hyper-parameters for it."""


@dataclass(frozen=True)
class Settings:
    """One call of `llava-prune eval`.

    Attributes:
        task: benchmark, a list a,b or "all".
        model: checkpoint folder or hub id.
        methods: names, in order; "all" is every registered method.
        tokens: visual token budgets, in order.
        data: folder with the benchmark's files, laid out as LLaVA's playground/data/eval.
        family, device, dtype, attn: see `llava_prune.load`; None for its default.
        batch: batch size; None chooses one by free memory.
        out: folder for the results; None for playground/results/<task>/<model>.
        limit: number of questions, counted from the first; None for all.
        max_new_tokens: largest number of new tokens of an answer; None for the benchmark's own.
        seed: random seed of sampling, and of methods that draw.
        method_args: hyper-parameters for every method that has them.
        reference: run the unpruned model as well.
        restart: discard earlier answers in `out`.
        num_chunks, chunk_idx: split the questions into contiguous chunks and run one of them. The last chunk to finish
            joins the answers.
    """

    task: str = "gqa"
    model: str = TINY
    methods: Sequence[str] = ("autoprune",)
    tokens: Sequence[int] = (64,)
    data: str = DATA
    family: str = "auto"
    batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    attn: str | None = None
    out: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    method_args: dict[str, Any] = field(default_factory=dict)
    reference: bool = True
    restart: bool = False
    num_chunks: int = 1
    chunk_idx: int = 0


def model_defaults(model: str) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by method that a checkpoint folder states in its llava_prune.json.

    Raises:
        ValueError: when the file is broken.
    """
    path = Path(model).expanduser() / MODEL_DEFAULTS
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8")).get("method_args", {})
        return {str(name): dict(values) for name, values in table.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: expected {{"method_args": {{method: {{name: value}}}}}} ({error})') from error


def plan_runs(settings: Settings) -> list[Run]:
    """Build every method at every budget once, the reference first; see `planner.plan`.

    Raises:
        ValueError: for unknown methods, hyper-parameters that no method has, or values out of range.
    """
    return plan(
        settings.methods,
        settings.tokens,
        settings.method_args,
        seed=settings.seed,
        defaults=model_defaults(settings.model),
        reference=settings.reference,
    )


def fingerprint(folder: Path) -> str:
    """sha256 of a checkpoint: names and sizes of its files, small files whole, 64 KiB at both ends of larger ones."""
    h, window = hashlib.sha256(), 1 << 16
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        h.update(f"{path.relative_to(folder)}:{size};".encode())
        with open(path, "rb") as handle:
            h.update(handle.read(window if size > 16 * window else -1))
            if size > 16 * window:
                handle.seek(-window, 2)
                h.update(handle.read())
    return h.hexdigest()
