"""Profile a prefill: kernel launches, host synchronisations, and the operations outside the decoder layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType

from ..models.family import family_of

PREFILL, LAYER = "llava_prune.prefill", "llava_prune.layer"
"""Names of the profiler spans of the language model and of its layers."""
RUNTIME = re.compile(r"cu(da)?[A-Z]\w+$")
"""Matches the calls of the CUDA runtime and driver."""
MOST = 10
"""Default number of listed operations."""


@contextmanager
def _spans(lm: Any) -> Iterator[None]:
    """Mark the calls of the language model and of its layers as named spans in a profile."""
    entered: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            entered.append(torch.profiler.record_function(name))
            entered[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = []
    for module, name in ((lm, PREFILL), *((layer, LAYER) for layer in lm.layers)):
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def operations(model: Any, prefill: Callable[[], Any], most: int = MOST) -> dict[str, Any]:
    """Profile one prefill after a warm-up prefill.

    Args:
        model: a LLaVA of either family, pruned or not.
        prefill: generates a single new token and calls the language model once.
        most: number of operations to list.

    Returns:
        "time": "device" if the times are those of kernels on a GPU, "operators" if they are those of CPU operators.
        "prefill" and "request": counts in the language model and in the whole call: kernel "launches", host
            "synchronisations", copies "to_host", and "calls" of the CUDA runtime by name. All are 0 on a CPU.
        "layers": microseconds of the operations inside the decoder layers, and the number of layers that ran.
        "outside": microseconds of the operations of the language model outside its layers, and their counts.
        "operations": the most expensive operations outside the layers: name, calls, microseconds.
    """
    lm = family_of(model).language_model(model)
    cuda = next(lm.parameters()).device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, *([activity.CUDA] if cuda else [])]
    prefill()
    with _spans(lm), torch.profiler.profile(activities=activities) as profile:
        prefill()
    events = [e for e in profile.events() if e.device_type == DeviceType.CPU]
    return _summary(events, cuda, most)


def _summary(events: Sequence[Any], cuda: bool, most: int) -> dict[str, Any]:
    (whole,) = (e for e in events if e.name == PREFILL)
    layers = [e for e in events if e.name == LAYER]
    plain = [e for e in events if e.name not in (PREFILL, LAYER)]
    within = [e for e in plain if _in(e, whole)]
    outside = [e for e in within if not any(_in(e, layer) for layer in layers)]
    spent: dict[str, float] = {}
    calls: Counter[str] = Counter()
    for e in outside:
        if not RUNTIME.match(e.name):
            spent[e.name] = spent.get(e.name, 0.0) + _microseconds(e, cuda)
            calls[e.name] += 1
    total = sum(_microseconds(e, cuda) for e in within if not RUNTIME.match(e.name))
    first = sorted(spent.items(), key=lambda x: -x[1])[:most]
    return {
        "time": "device" if cuda else "operators",
        "prefill": _counts(within),
        "request": _counts(plain),
        "layers": {"microseconds": total - sum(spent.values()), "number": len(layers)},
        "outside": {"microseconds": sum(spent.values()), **_counts(outside)},
        "operations": [{"name": n, "calls": calls[n], "microseconds": us} for n, us in first],
    }


def _in(event: Any, span: Any) -> bool:
    return bool(span.time_range.start <= event.time_range.start < span.time_range.end and event.thread == span.thread)


def _microseconds(event: Any, cuda: bool) -> float:
    return float(event.self_device_time_total if cuda else event.self_cpu_time_total)


def _counts(events: Sequence[Any]) -> dict[str, Any]:
    calls = Counter(e.name for e in events if RUNTIME.match(e.name))
    copies = sum("DtoH" in kernel.name for e in events for kernel in e.kernels)
    return {
        "launches": sum(n for name, n in calls.items() if "Launch" in name),
        "synchronisations": sum(n for name, n in calls.items() if "Synchronize" in name),
        "to_host": copies,
        "calls": dict(calls.most_common()),
    }
