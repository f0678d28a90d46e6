"""`llava-prune bench`: methods x budgets x batch sizes x prompt lengths against the unpruned model."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import llava_prune

from ..methods.base import Method
from ..methods.registry import resolve
from ..models.base import family_of
from ..handle import pruned
from ..runtime.graphs import RECORDED, Graphs, check_step
from .floor import Machine, decode_floor, measure_machine, prefill_floor
from .flops import Size, average_tokens, filler, layer_flops
from .latency import alternate, deciding, quartiles, stages
from .memory import peaks
from .request import Request, request

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
"""Called with what is measured next."""
FOLDER = "playground/results/bench"


@dataclass(frozen=True)
class Settings:
    """One call of `llava-prune bench`.

    Attributes:
        model: checkpoint folder or hub id; None for a random model.
        shape: of the random model.
        methods, tokens: what is measured, every method at every budget.
        batches: samples at once.
        texts: text tokens of a prompt, the visual ones not counted.
        new: new tokens of a request, at least 2.
        repeats, warmup: pairs of an unpruned and a pruned request, those before the count.
        family, device, dtype, attn: see `llava_prune.load`; None for its default (float32 for a shape on a CPU,
            bfloat16 on a GPU).
        threads: of the CPU; None leaves torch's choice.
        method_args: hyper-parameters for every method that has them.
        seed: of weights, prompts and pictures.
        memory: measure peak memory too.
        graphs: replay pruned requests (`attach(..., graphs=True)`) when times are taken; needs CUDA. Unpruned ones,
            memory and the time spent deciding are measured without.
        text_step: see `attach`.
        fused: Triton kernels for the cuts, see `attach`; needs CUDA.
        profile: write a trace of one pruned request each.
        out: folder; None for playground/results/bench/<shape or model>.
    """

    model: str | None = None
    shape: str = "300m"
    methods: Sequence[str] = ("autoprune",)
    tokens: Sequence[int] = (192, 128, 64)
    batches: Sequence[int] = (1,)
    texts: Sequence[int] = (84,)
    new: int = 8
    repeats: int = 5
    warmup: int = 1
    family: str = "auto"
    device: str | None = None
    dtype: str | None = None
    attn: str | None = None
    threads: int | None = None
    method_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    memory: bool = True
    graphs: bool = False
    text_step: int | None = None
    fused: bool = False
    profile: bool = False
    out: str | None = None

    @property
    def name(self) -> str:
        """What is measured, as a folder's name."""
        return self.shape if self.model is None else Path(self.model).name


@dataclass(frozen=True)
class _Case:
    """One method at one budget; the label is its folder-safe name."""

    name: str
    tokens: int | None
    method: Method

    @property
    def label(self) -> str:
        return self.name.replace(":", "-") + ("" if self.tokens is None else f"-{self.tokens}")


def cases(settings: Settings) -> list[_Case]:
    """Every method at every budget, methods without one once.

    Raises:
        ValueError: for unknown methods or hyper-parameters that none of them has.
    """
    out, used = [], set()
    for name in dict.fromkeys(settings.methods):
        known = set(inspect.signature(resolve(name)[0]).parameters)
        used |= known
        hyper = {k: v for k, v in settings.method_args.items() if k in known}
        for tokens in dict.fromkeys(settings.tokens) if "tokens" in known else [None]:
            extra = {} if tokens is None else {"tokens": tokens}
            out.append(_Case(name, tokens, llava_prune.build(name, **{**hyper, **extra})))
    stray = sorted(set(settings.method_args) - used)
    if stray:
        raise ValueError(f"none of {', '.join(settings.methods)} has a hyper-parameter {', '.join(stray)}")
    return out


def load(settings: Settings) -> Any:
    """The model to measure."""
    if settings.model is not None:
        family: Any = settings.family
        return llava_prune.load(
            settings.model, family=family, dtype=settings.dtype, device=settings.device, attn=settings.attn
        )
    from ..models.load import pick_dtype
    from .shapes import random_model

    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = pick_dtype(settings.dtype or default, {}, device)
    return random_model(settings.shape, device, dtype, settings.attn, settings.seed)


def speed(settings: Settings, progress: Progress = lambda _: None, command: str = "") -> dict[str, Any]:
    """Measure, and write bench.json, the plot and traces.

    Args:
        settings: what to measure.
        progress: told what comes next.
        command: recorded in the result.

    Returns:
        {"command", "settings", "machine", "rows"}, as in bench.json; see `measure` for a row.

    Raises:
        ValueError: for bad settings.
    """
    if settings.new < 2:
        raise ValueError(f"new={settings.new}: decoding is timed from the second new token on; give 2 or more")
    check_step(settings.text_step, settings.graphs)
    if settings.repeats < 1:
        raise ValueError(f"repeats={settings.repeats}: give 1 or more")
    wanted = cases(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    progress(f"loading {settings.name}")
    loaded = load(settings)
    parameter = next(loaded.model.parameters())
    rows = list(_rows(settings, loaded, wanted, progress))
    result = {
        "command": command,
        "settings": {**dataclasses.asdict(settings), "family": loaded.family},
        "machine": {
            "device": _device_name(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    folder = out_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def out_folder(settings: Settings) -> Path:
    """Where the result goes."""
    return Path(settings.out).expanduser() if settings.out else Path(FOLDER) / settings.name


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _rows(settings: Settings, loaded: Any, wanted: Sequence[_Case], progress: Progress) -> Iterator[dict[str, Any]]:
    """One row for each case, batch size and prompt length; memory that runs out is a row too."""
    for batch in settings.batches:
        for text in settings.texts:
            asked = request(loaded, batch, text, settings.new, settings.seed)
            size = _size(loaded, asked)
            parameter = next(loaded.model.parameters())
            machine = measure_machine(parameter.device, parameter.dtype, batch * (asked.visual + text), size)
            for case in wanted:
                head = {"method": case.name, "tokens": case.tokens, "hyper": _plain(case.method.hyper())}
                head |= {"batch": batch, "text": text, "visual": asked.visual}
                progress(f"{case.label}, batch {batch}, {asked.visual} + {text} tokens")
                try:
                    row = {**head, **measure(settings, loaded, case.method, asked, size, machine)}
                except torch.OutOfMemoryError:
                    log.warning("%s, batch %d: out of memory", case.label, batch)
                    row = {**head, "error": "out of memory"}
                if settings.profile and "error" not in row:
                    stem = out_folder(settings) / f"trace-{case.label}-b{batch}-t{text}"
                    _trace(stem, loaded, case.method, asked, settings.fused)
                yield row


def _plain(hyper: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, float, str, type(None))) else repr(v) for k, v in hyper.items()}


def _size(loaded: Any, asked: Request) -> Size:
    shape = loaded.shape
    return Size(shape.layers, shape.hidden, shape.intermediate, asked.visual)


def measure(
    settings: Settings, loaded: Any, method: Method, asked: Request, size: Size, machine: Machine
) -> dict[str, Any]:
    """Everything about one method on one kind of request.

    Returns:
        "graphs": whether pruned requests were replayed; "stages": see `latency.stages`, milliseconds; "flops": equation
        (2) on visual and text tokens entering the layers, both models, and their ratio; "efficiency": prefill speed-up
        over FLOPs ratio; "deciding": quartiles in milliseconds, the median's share of the unpruned prefill, and the
        median of its share of the pruned one; "average_entering": visual tokens; "padding": filler rows over live ones
        in the pruned layers; "floor": milliseconds of prefill and decode for both models on `machine`; "memory": see
        `memory.peaks`, both models.
    """
    model, text = loaded.model, asked.text
    graphs = Graphs(method, model.device, settings.text_step) if settings.graphs else False
    warmup = max(settings.warmup, RECORDED) if graphs else settings.warmup
    plain, cut, last = alternate(model, asked.ask, method, settings.repeats, warmup, graphs, settings.fused)
    times = stages(plain, cut)
    visual = [[asked.visual] * size.layers] * asked.batch if last is None else last.tokens_in.tolist()
    full = [[asked.visual + text] * size.layers] * asked.batch
    live = [[n + text for n in row] for row in visual]
    cost = {"full": _flops(full, size), "pruned": _flops(live, size)}
    ratio = cost["full"] / cost["pruned"]
    decided = deciding(model, asked.ask, method, settings.repeats, settings.fused)
    outside = quartiles([a for a, _ in decided])
    width = next(model.parameters()).element_size()
    row: dict[str, Any] = {
        "graphs": bool(graphs),
        "stages": times,
        "flops": {**cost, "ratio": ratio},
        "efficiency": times["prefill"]["speedup"]["median"] / ratio,
        "deciding": {
            **outside,
            "share_of_full": outside["median"] / times["prefill"]["full"]["median"],
            "share_of_pruned": statistics.median(a / b for a, b in decided),
        },
        "average_entering": average_tokens([n for row in visual for n in row]),
        "padding": filler([live]),
        "floor": {
            **dataclasses.asdict(machine),
            "prefill_full": prefill_floor(full, size, width, machine),
            "prefill_pruned": prefill_floor(live, size, width, machine),
            "decode_full": decode_floor(full, size, width, machine),
            "decode_pruned": decode_floor(live, size, width, machine),
        },
    }
    if settings.memory:
        lm = family_of(model).language_model(model)
        row["memory"] = {"full": peaks(asked.prefill, lm, model.device)}
        with pruned(model, method, fused=settings.fused):
            row["memory"]["pruned"] = peaks(asked.prefill, lm, model.device)
    return row


def _flops(counts: Sequence[Sequence[float]], size: Size) -> float:
    return sum(layer_flops(n, size.hidden, size.intermediate) for row in counts for n in row)


def _trace(stem: Path, loaded: Any, method: Method, asked: Request, fused: bool) -> None:
    """A Chrome trace of one pruned prefill, and its operators by time as text."""
    activity = torch.profiler.ProfilerActivity
    cuda = loaded.model.device.type == "cuda"
    stem.parent.mkdir(parents=True, exist_ok=True)
    with pruned(loaded.model, method, fused=fused):
        asked.prefill()
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
            asked.prefill()
    profile.export_chrome_trace(f"{stem}.json")
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=40)
    stem.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
