"""`llava-prune bench`: compare every method, budget, batch size and prompt length with the unpruned model."""

from __future__ import annotations

import dataclasses
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

from ..arguments import RESULTS
from ..handle import pruned
from ..methods.base import Method
from ..methods.checks import integer, json_values
from ..methods.checks import seed as check_seed
from ..methods.planner import Run, cases, check_budgets, check_schedules, plan
from ..models.config import pick_dtype
from ..models.family import family_of
from ..models.parallel import is_first_process, processes
from ..models.placement import out_of_memory
from ..ops.counts import layer_flops
from .floor import Machine, decode_floor, measure_machine, prefill_floor
from .flops import Size, average_tokens, ragged_padding
from .latency import alternate, pruning_overhead, quartiles, stages
from .memory import peaks
from .request import Request, request
from .shapes import random_model

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
"""Called with a description of the next measurement."""
FOLDER = f"{RESULTS}/bench"


@dataclass(frozen=True)
class Settings:
    """One call of `llava-prune bench`.

    Attributes:
        model: checkpoint folder or hub id; None for a random model.
        shape: shape of the random model.
        methods, tokens: methods and budgets; every method is measured at every budget.
        batches: batch sizes.
        texts: numbers of text tokens of a prompt, visual tokens not counted.
        new: number of new tokens of a request, at least 2.
        repeats: number of timed pairs of an unpruned and a pruned request.
        warmup: number of untimed pairs before them.
        family, device, dtype, attn: see `llava_prune.load`; None for its default (for a random model, float32 on a CPU
            and bfloat16 on a GPU).
        device_map, load_8bit, load_4bit, engine: see `llava_prune.load`; for a checkpoint only.
        threads: CPU threads for pruned and unpruned requests; None for torch's default.
        method_args: hyper-parameters, which every method that has them receives.
        seed: random seed of weights, prompts and images, and of randomised methods.
        memory: whether to measure peak memory.
        graphs: experimental: replay pruned requests (`attach(..., graphs=True)`) while they are timed. Unpruned
            requests, memory and pruning overhead are measured without graphs.
        text_step: experimental, see `attach`.
        fused: experimental: use Triton kernels for the cuts, see `attach`.
        profile: whether to write a profiler trace of one pruned prefill of each run.
        out: folder for the results; None for playground/results/bench/<shape or model>.
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
    device_map: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    engine: str | None = None
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
        """Shape or model name, which names the folder of results."""
        return self.shape if self.model is None else Path(self.model).name


def plan_runs(settings: Settings) -> list[Run]:
    """Build every method at every budget once; see `planner.cases`.

    Raises:
        ValueError: for unknown methods, hyper-parameters that no method has, or values out of range.
    """
    return plan(cases(settings.methods, settings.tokens, settings.method_args, seed=settings.seed))


def load(settings: Settings) -> Any:
    """Load the checkpoint, or build the random model, that the settings name."""
    placed = {name: getattr(settings, name) for name in ("device_map", "load_8bit", "load_4bit", "engine")}
    if settings.model is not None:
        family: Any = settings.family
        return llava_prune.load(
            settings.model, family=family, dtype=settings.dtype, device=settings.device, attn=settings.attn, **placed
        )
    asked = [name for name, value in placed.items() if value]
    if asked:
        raise ValueError(f"{asked[0]} is for checkpoints, not for the random model of a shape; give model (--model)")
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = pick_dtype(settings.dtype or default, {}, device)
    return random_model(settings.shape, device, dtype, settings.attn, settings.seed)


def speed(settings: Settings, progress: Progress = lambda _: None, command: str = "") -> dict[str, Any]:
    """Run all measurements and write bench.json after every row, and the traces.

    Of the several processes of an engine, the first one writes.

    Args:
        settings: settings of the measurements.
        progress: called before each measurement.
        command: recorded in the result.

    Returns:
        The last value of `results`, i.e. the content of bench.json.

    Raises:
        ValueError: for bad settings.
    """
    result: dict[str, Any] = {}
    for result in results(settings, progress, command):
        if is_first_process():
            folder = out_folder(settings)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def results(
    settings: Settings, progress: Progress = lambda _: None, command: str = "", loaded: Any = None
) -> Iterator[dict[str, Any]]:
    """Run the measurements and yield the result so far after every row.

    Args:
        settings: settings of the measurements.
        progress: called before each measurement.
        command: recorded in the result.
        loaded: model to measure; None to load that of the settings.

    Yields:
        {"command", "settings", "machine", "rows"}; see `measure` for a row.

    Raises:
        ValueError: for bad settings.
    """
    if settings.new < 2:
        raise ValueError(f"new={settings.new}: decoding is timed from the second new token on; give 2 or more")
    integer("repeats", settings.repeats, 1, none=False)
    integer("warmup", settings.warmup, none=False)
    check_seed(settings.seed)
    if settings.graphs or settings.text_step is not None:
        from ..experimental.graphs import check_step

        check_step(settings.text_step, settings.graphs)
    runs = plan_runs(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if loaded is None:
        progress(f"loading {settings.name}")
        loaded = load(settings)
    rows: list[dict[str, Any]] = []
    for row in _rows(settings, loaded, runs, progress):
        rows.append(row)
        yield {
            "command": command,
            "settings": {**dataclasses.asdict(settings), "family": loaded.family},
            "machine": _machine(loaded),
            "rows": list(rows),
        }


def _machine(loaded: Any) -> dict[str, Any]:
    return {
        "device": _device_name(loaded.device),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def out_folder(settings: Settings) -> Path:
    """Return the folder for the results."""
    return Path(settings.out).expanduser() if settings.out else Path(FOLDER) / settings.name


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _rows(settings: Settings, loaded: Any, runs: Sequence[Run], progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield one row for each run, batch size and prompt length; if memory runs out, the row has "error"."""
    for batch in settings.batches:
        for text in settings.texts:
            asked = request(loaded, batch, text, settings.new, settings.seed)
            size = _size(loaded, asked)
            check_budgets(runs, asked.visual)
            check_schedules(runs, asked.visual, size.layers)
            dtype = next(loaded.model.parameters()).dtype
            machine = measure_machine(loaded.device, dtype, batch * (asked.visual + text), size)
            for run in runs:
                head: dict[str, Any] = {"label": run.label, "method": run.name, "tokens": run.tokens}
                head |= {"hyper": json_values(run.method.hyper()), "batch": batch, "text": text, "visual": asked.visual}
                progress(f"{run.label}, batch {batch}, {asked.visual} + {text} tokens")
                try:
                    row = {**head, **measure(settings, loaded, run.method, asked, size, machine)}
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error) or processes() > 1:  # other processes would wait for this one forever
                        raise
                    log.warning("%s, batch %d: out of memory", run.label, batch)
                    row = {**head, "error": "out of memory"}
                if settings.profile and "error" not in row:
                    stem = out_folder(settings) / f"trace-{run.label}-b{batch}-t{text}"
                    _trace(stem, loaded, run.method, asked, settings.fused)
                yield row


def _size(loaded: Any, asked: Request) -> Size:
    return dataclasses.replace(loaded.size, visual=asked.visual)


def measure(
    settings: Settings, loaded: Any, method: Method, asked: Request, size: Size, machine: Machine
) -> dict[str, Any]:
    """Measure time, FLOPs and memory of one method on one kind of request.

    Returns:
        "graphs": whether pruned requests were replayed from CUDA graphs.
        "stages": milliseconds of the stages, see `latency.stages`.
        "flops": equation (2) on the visual and text tokens entering the layers, for both models, and the ratio.
        "efficiency": prefill speed-up over FLOPs ratio.
        "overhead": pruning overhead: quartiles in milliseconds, its median over the median unpruned prefill, and the
            median of its share of the pruned prefill.
        "average_entering": visual tokens entering a layer, mean over layers and samples.
        "padding": ragged padding of the pruned layers: padding tokens over real tokens.
        "floor": lower bounds of prefill and decoding time on `machine` in milliseconds, for both models.
        "memory": see `memory.peaks`, for both models.
    """
    model, text = loaded.model, asked.text
    graphs, warmup = _graphs(settings, method, loaded.device)
    plain, cut, last = alternate(model, asked.ask, method, settings.repeats, warmup, graphs, settings.fused)
    times = stages(plain, cut)
    visual = [[asked.visual] * size.layers] * asked.batch if last is None else last.tokens_in.tolist()
    full = [[asked.visual + text] * size.layers] * asked.batch
    live = [[n + text for n in row] for row in visual]
    cost = {"full": _flops(full, size), "pruned": _flops(live, size)}
    ratio = cost["full"] / cost["pruned"]
    outside = pruning_overhead(model, asked.ask, method, settings.repeats, settings.fused)
    overhead = quartiles([a for a, _ in outside])
    width = next(model.parameters()).element_size()
    row: dict[str, Any] = {
        "graphs": bool(graphs),
        "stages": times,
        "flops": {**cost, "ratio": ratio},
        "efficiency": times["prefill"]["speedup"]["median"] / ratio,
        "overhead": {
            **overhead,
            "share_of_full": overhead["median"] / times["prefill"]["full"]["median"],
            "share_of_pruned": statistics.median(a / b for a, b in outside),
        },
        "average_entering": average_tokens([n for row in visual for n in row]),
        "padding": ragged_padding([live]),
        "floor": {
            **dataclasses.asdict(machine),
            "prefill_full": prefill_floor(full, size, width, machine),
            "prefill_pruned": prefill_floor(live, size, width, machine),
            "decode_full": decode_floor(full, size, width, machine),
            "decode_pruned": decode_floor(live, size, width, machine),
        },
    }
    if settings.memory:
        row["memory"] = _memory(loaded, method, asked, settings.fused)
    return row


def _graphs(settings: Settings, method: Method, device: torch.device) -> tuple[Any, int]:
    """Return the `graphs` argument of `attach`, and the number of warm-up pairs."""
    if not settings.graphs:
        return False, settings.warmup
    from ..experimental.graphs import RECORDED, Graphs

    return Graphs(method, device, settings.text_step), max(settings.warmup, RECORDED)


def _memory(loaded: Any, method: Method, asked: Request, fused: bool) -> dict[str, dict[str, int]]:
    """Return the peak bytes of unpruned and pruned prefills on the device of the inputs."""
    model, device = loaded.model, loaded.device
    lm = family_of(model).language_model(model)
    full = peaks(asked.prefill, lm, device)
    with pruned(model, method, fused=fused):
        return {"full": full, "pruned": peaks(asked.prefill, lm, device)}


def _flops(counts: Sequence[Sequence[float]], size: Size) -> float:
    return sum(layer_flops(n, size.hidden, size.intermediate) for row in counts for n in row)


def _trace(stem: Path, loaded: Any, method: Method, asked: Request, fused: bool) -> None:
    """Write a Chrome trace of one pruned prefill, and a table of its operators sorted by time."""
    activity = torch.profiler.ProfilerActivity
    cuda = loaded.device.type == "cuda"
    stem.parent.mkdir(parents=True, exist_ok=True)
    with pruned(loaded.model, method, fused=fused):
        asked.prefill()
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
            asked.prefill()
    if not is_first_process():
        return
    profile.export_chrome_trace(f"{stem}.json")
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=40)
    stem.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
