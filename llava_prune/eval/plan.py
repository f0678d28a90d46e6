"""The settings of an evaluation, and the runs that follow from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import DATA, RESULTS, TINY
from ..methods.budgets import Budget
from ..methods.planner import REFERENCE, Request, Run, cases_of, plan
from ..methods.registry import names
from ..models.load import read_size
from .task import Task

MODEL_DEFAULTS = "llava_prune.json"
"""Name of the file in a checkpoint folder that states hyper-parameters for the checkpoint."""


@dataclass(frozen=True)
class Settings:
    """One call of `llava-prune eval`.

    Attributes:
        task: benchmark, a list a,b or "all".
        model: checkpoint folder or hub id.
        model_base: checkpoint that `model`, an adapter, was trained on; None for a complete checkpoint.
        methods: names of methods, in order; "all" is every registered method.
        tokens: budgets, in order: visual tokens, or shares of the model's visual tokens or FLOPs.
        requests: methods, budgets and hyper-parameters that replace `methods` and `tokens`.
        data: folder with the benchmark's files, laid out as LLaVA's playground/data/eval.
        conv_mode: conversation template, see `protocol.protocol_of`; None for that of the checkpoint.
        family, device, dtype, attn, device_map, load_8bit, load_4bit, engine: see `llava_prune.load`; None for its
            default.
        batch: batch size; None chooses one by free memory.
        out: folder for the results; None for <store>/<task>/<model>.
        store: folder of all results.
        limit: number of questions to ask, counted from the first; None for all.
        max_new_tokens: largest number of new tokens of an answer; None for the benchmark's own limit.
        seed: random seed of sampling and of randomised methods.
        method_args: hyper-parameters, which every method that has them receives.
        reference: whether to run the unpruned model as well.
        restart: whether to discard earlier answers in `out`.
        num_chunks, chunk_idx: number of contiguous chunks that the questions are split into, and the chunk to run. The
            last chunk to finish joins the answers.
    """

    task: str = "gqa"
    model: str = TINY
    model_base: str | None = None
    methods: Sequence[str] = ("autoprune",)
    tokens: Sequence[Budget] = (64,)
    requests: Sequence[Request] = ()
    data: str = DATA
    family: str = "auto"
    conv_mode: str | None = None
    batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    attn: str | None = None
    device_map: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    engine: str | None = None
    out: str | None = None
    store: str = RESULTS
    limit: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    method_args: dict[str, Any] = field(default_factory=dict)
    reference: bool = True
    restart: bool = False
    num_chunks: int = 1
    chunk_idx: int = 0


def model_defaults(model: str) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters by method that a checkpoint folder states in its llava_prune.json.

    Raises:
        ValueError: if the file is broken.
    """
    path = Path(model).expanduser() / MODEL_DEFAULTS
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8")).get("method_args", {})
        return {str(name): dict(values) for name, values in table.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: expected {{"method_args": {{method: {{name: value}}}}}} ({error})') from error


def plan_runs(settings: Settings, task: Task | None = None) -> list[Run]:
    """Build every method at every budget once, the reference first; see `planner.cases_of`.

    Hyper-parameters come from the method, the benchmark's official runner, the checkpoint, METHOD_ARGS and the request;
    later sources override earlier ones.

    Args:
        settings: settings of the evaluation.
        task: the benchmark; None for no hyper-parameters of a benchmark.

    Raises:
        ValueError: for unknown methods, hyper-parameters that no method has, or values out of range.
    """
    shared, own = {} if task is None else task.method_args, model_defaults(settings.model)
    defaults = {name: {**shared, **own.get(name, {})} for name in {*names(), *own}}
    requests = [*(settings.requests or [Request(settings.methods, settings.tokens)])]
    if settings.reference:
        requests.insert(0, Request([REFERENCE], [1]))
    sized = any(not isinstance(b, int) for r in requests for b in r.budgets)
    size = read_size(settings.model, settings.model_base) if sized else None
    return plan(cases_of(requests, settings.method_args, seed=settings.seed, defaults=defaults, size=size))
