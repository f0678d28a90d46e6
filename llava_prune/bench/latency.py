"""Time the stages of a request (vision, prefill, decode, total), alternating between the unpruned and the pruned model.

Times are taken at entry and exit of the language model, with CUDA events on a GPU and with the host's clock elsewhere.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..handle import pruned
from ..models.family import family_of
from ..runtime.patching import execution_device

STAGES = ("vision", "prefill", "decode", "total")
Ask = Callable[[], Any]
"""Generates a fixed number of new tokens, at least 2, for one batch of prompts."""


class Clock:
    """Takes timestamps on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return a timestamp: a recorded CUDA event on a GPU, the host's time elsewhere."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks; call `wait` first."""
        return float(start.elapsed_time(end)) if self.cuda else 1000 * (end - start)


@dataclass
class Probe:
    """Timestamps of one request: entry and exit of every call of the language model and, on request, of its layers."""

    clock: Clock
    calls: list[list[Any]] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)

    def enter(self, *_: Any) -> None:
        """Record the entry of the language model; a forward pre-hook."""
        self.calls.append([self.clock.mark()])

    def leave(self, *_: Any) -> None:
        """Record the exit of the language model; a forward hook."""
        self.calls[-1].append(self.clock.mark())

    def layer(self, *_: Any) -> None:
        """Record entry or exit of a decoder layer in the prefill, the first call; a forward hook and pre-hook."""
        if len(self.calls) == 1:
            self.layers.append(self.clock.mark())


@contextmanager
def probing(model: Any, layers: bool = False) -> Iterator[Probe]:
    """Install the hooks of a `Probe`. Enter it before `pruned`, so that its hooks run first."""
    lm = family_of(model).language_model(model)
    probe = Probe(Clock(execution_device(model, torch.device("cpu"))))
    hooks = [lm.register_forward_pre_hook(probe.enter), lm.register_forward_hook(probe.leave)]
    for layer in lm.layers if layers else ():
        hooks += [layer.register_forward_pre_hook(probe.layer), layer.register_forward_hook(probe.layer)]
    try:
        yield probe
    finally:
        for hook in hooks:
            hook.remove()


def once(ask: Ask, probe: Probe) -> dict[str, float]:
    """Run one request and return the milliseconds of each stage.

    Returns:
        "vision": from the call to the first entry of the language model (tower, projector, splicing, and the work of a
        method there); "prefill": the language model on the prompt; "decode": the language model on a new token, median
        over the tokens; "total": the whole call, including the output head and the bookkeeping of `generate`.

    Raises:
        ValueError: if the request generated fewer than 2 new tokens.
    """
    _, times = timed(ask, probe)
    if "decode" not in times:
        raise ValueError("a request has a single new token; decoding is timed from at least 2 new tokens")
    return times


def timed(ask: Ask, probe: Probe) -> tuple[Any, dict[str, float]]:
    """Run one request and return its result, and its times as in `once`.

    "decode" is absent if the request has a single new token.
    """
    probe.calls.clear()
    probe.layers.clear()
    clock = probe.clock
    clock.wait()
    start = clock.mark()
    answer = ask()
    end = clock.mark()
    clock.wait()
    prefill, *decode = [clock.ms(a, b) for a, b in probe.calls]
    times = {"vision": clock.ms(start, probe.calls[0][0]), "prefill": prefill, "total": clock.ms(start, end)}
    return answer, {**times, "decode": statistics.median(decode)} if decode else times


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alternate(
    model: Any, ask: Ask, method: Any, repeats: int, warmup: int, graphs: Any = False, fused: bool = False
) -> tuple[list[dict[str, float]], list[dict[str, float]], Any]:
    """Time unpruned and pruned requests alternately (A B A B) in one process.

    Both use the same libraries, threads and settings.

    Args:
        model: see `pruned`.
        ask: one request.
        method: a Method.
        repeats: number of timed pairs.
        warmup: number of untimed pairs before them.
        graphs, fused: experimental, see `attach`.

    Returns:
        (stages of each unpruned request, stages of each pruned request, Record of the last pruned prefill).
    """
    plain, cut, last = [], [], None
    with probing(model) as probe, _no_collection():
        for i in range(warmup + repeats):
            first = once(ask, probe)
            with pruned(model, method, graphs=graphs, fused=fused) as handle:
                second = once(ask, probe)
                last = handle.last
            if i >= warmup:
                plain.append(first)
                cut.append(second)
    return plain, cut, last


def pruning_overhead(model: Any, ask: Ask, method: Any, repeats: int, fused: bool = False) -> list[tuple[float, float]]:
    """Return, for each run, the milliseconds of a pruned prefill outside the decoder layers and of the whole prefill.

    The time outside the layers includes scores, selection, merging and gathering. It also includes the rotary table,
    the mask and the final norm, which an unpruned model computes as well.
    """
    out = []
    with probing(model, layers=True) as probe, pruned(model, method, fused=fused), _no_collection():
        for i in range(1 + repeats):
            whole = once(ask, probe)["prefill"]
            marks = probe.layers
            inside = sum(probe.clock.ms(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True))
            if i:
                out.append((whole - inside, whole))
    return out


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return {"q1": first quartile, "median": median, "q3": third quartile}."""
    if len(values) == 1:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    return dict(zip(("q1", "median", "q3"), statistics.quantiles(values, n=4, method="inclusive"), strict=True))


def stages(plain: Sequence[dict[str, float]], cut: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return, for each stage, the quartiles of both models and of the speed-up within a pair (unpruned over pruned)."""
    out = {}
    for name in STAGES:
        a, b = [x[name] for x in plain], [x[name] for x in cut]
        ratio = [x / y for x, y in zip(a, b, strict=True)]
        out[name] = {"full": quartiles(a), "pruned": quartiles(b), "speedup": quartiles(ratio)}
    return out
