"""What an evaluation will do, settled before any model is loaded: settings, methods, files."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import llava_prune

from ..methods.base import Method
from ..methods.registry import resolve, takes_budget

TINY = "playground/models/llava-tiny"
DATA = "playground/data/mini"
RESULTS = "playground/results"
MODEL_DEFAULTS = "llava_prune.json"


@dataclass(frozen=True)
class Settings:
    """One call of `llava-prune eval`.

    Attributes:
        task: benchmark, a list a,b or "all".
        model: folder or hub id.
        methods: names, in order; "all" is every registered one.
        tokens: budgets, in order.
        data: folder with the benchmark's files, LLaVA's playground/data/eval or one like it.
        family, device, dtype, attn: see `llava_prune.load`; None for its default.
        batch: samples at once; None by free memory.
        out: folder of the results; None for playground/results/<task>/<model>.
        limit: only the first so many questions.
        max_new_tokens: limit of an answer; None for the benchmark's own.
        seed: of sampling and of methods that draw.
        method_args: hyper-parameters for every method that has them.
        reference: run the unpruned model as well.
        restart: discard earlier answers in `out`.
        num_chunks, chunk_idx: run one of so many contiguous parts; the last to end joins them.
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


@dataclass(frozen=True)
class Run:
    """One method at one budget.

    Attributes:
        label: e.g. "autoprune-64"; the folder's name.
        name: method name, with its preset.
        tokens: budget, None for methods without one.
        method: the instance.
    """

    label: str
    name: str
    tokens: int | None
    method: Method


def parse_args(text: str) -> dict[str, Any]:
    """ "mi_scale=8,budget=after" as a dict; values are read as YAML scalars.

    Raises:
        ValueError: for a part without "=".
    """
    out: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, sign, value = part.partition("=")
        if not sign or not key.strip().isidentifier():
            raise ValueError(f"{part!r} is no hyper-parameter; write name=value, several separated by commas")
        try:
            out[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{part!r}: the value cannot be read; give a number, true, false or a word") from error
    return out


def model_defaults(model: str) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by method that a checkpoint folder states in llava_prune.json.

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
    """Build every method once, the reference first.

    Raises:
        ValueError: for unknown methods, hyper-parameters no method has, or values out of range.
    """
    given = [n for m in settings.methods for n in (llava_prune.names() if m == "all" else [m])]
    names = list(dict.fromkeys(given))
    if settings.reference:
        names = ["full", *(n for n in names if n != "full")]
    if not names:
        raise ValueError(f"no method given; choose among {', '.join(llava_prune.names())}")
    if not settings.tokens:
        raise ValueError("no budget given; TOKENS is a number of visual tokens or a list, e.g. 192,128,64")
    defaults, used, runs = model_defaults(settings.model), set(), []
    for name in names:
        cls, own = resolve(name)
        known = set(inspect.signature(cls).parameters)
        stated = [defaults.get(part.name, {}) for part in (*getattr(cls, "parts", ()), cls)]
        hyper = {k: v for table in (*stated, settings.method_args) for k, v in table.items() if k in known}
        used |= known
        if "seed" in known:
            hyper.setdefault("seed", settings.seed)
        budgets: list[int | None] = [own["tokens"]] if "tokens" in own else [*dict.fromkeys(settings.tokens)]
        if not takes_budget(cls, {**own, **hyper}):
            budgets = [None]
        for tokens in budgets:
            extra = {} if tokens is None else {"tokens": tokens}
            label = name.replace(":", "-") + ("" if tokens is None else f"-{tokens}")
            runs.append(Run(label, name, tokens, llava_prune.build(name, **{**hyper, **extra})))
    stray = sorted(set(settings.method_args) - used)
    if stray:
        raise ValueError(f"METHOD_ARGS: none of {', '.join(names)} has a hyper-parameter {', '.join(stray)}")
    return runs


def check_budgets(runs: Sequence[Run], limit: int) -> None:
    """Refuse budgets above the model's visual tokens.

    Raises:
        ValueError: naming the limit.
    """
    for run in runs:
        if run.tokens is not None and run.tokens > limit:
            raise ValueError(
                f"TOKENS={run.tokens}: this model has {limit} visual tokens a picture; give {limit} or fewer"
            )


def fingerprint(folder: Path) -> str:
    """A sha256 over a checkpoint: names and sizes of all files, configs whole, of weights head and tail (64 KiB)."""
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
