"""Profiles of prefills: operations, launches and synchronisations, and where they occur."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

import llava_prune
from llava_prune.bench import operations as module
from llava_prune.bench.operations import LAYER, PREFILL, operations
from llava_prune.bench.request import request
from llava_prune.bench.shapes import random_model


def event(name: str, start: int, end: int, us: float = 0.0, kernels: Any = (), thread: int = 1) -> Any:
    return SimpleNamespace(
        name=name,
        thread=thread,
        kernels=[SimpleNamespace(name=k) for k in kernels],
        time_range=SimpleNamespace(start=start, end=end),
        self_device_time_total=us,
        self_cpu_time_total=100 * us,
        device_type=DeviceType.CPU,
    )


def test_summary_by_hand() -> None:
    """Two layers from 10 to 20 and 30 to 40, in a prefill from 5 to 50."""
    events = [
        event("aten::conv2d", 0, 4, 9.0),  # the tower
        event("cudaLaunchKernel", 1, 2),
        event(PREFILL, 5, 50),
        event(LAYER, 10, 20),
        event("aten::mm", 11, 13, 5.0),
        event("cudaLaunchKernel", 12, 13),
        event("aten::topk", 21, 24, 3.0),
        event("cudaLaunchKernel", 22, 23),
        event("cuLaunchKernelEx", 23, 24),
        event("aten::copy_", 25, 28, 1.0, ["Memcpy DtoH (Device -> Pageable)"]),
        event("cudaStreamSynchronize", 26, 28),
        event("aten::mm", 26, 27, 7.0, thread=2),  # another thread's
        event(LAYER, 30, 40),
        event("aten::mm", 31, 33, 5.0),
        event("aten::topk", 41, 42, 2.0),
        event("cudaDeviceSynchronize", 60, 61),
    ]
    found = module._summary(events, True, 2)
    assert found["operations"] == [
        {"name": "aten::topk", "calls": 2, "microseconds": 5.0},
        {"name": "aten::copy_", "calls": 1, "microseconds": 1.0},
    ]
    assert found["layers"] == {"microseconds": 10.0, "number": 2}
    assert found["prefill"]["launches"] == 3 and found["prefill"]["synchronisations"] == 1
    assert found["request"]["launches"] == 4 and found["request"]["synchronisations"] == 2
    outside = found["outside"]
    assert (outside["microseconds"], outside["launches"], outside["to_host"]) == (6.0, 2, 1)
    assert module._summary(events, False, 1)["outside"]["microseconds"] == 600.0


@pytest.mark.parametrize("name", ["full", "autoprune"])
def test_a_prefill(name: str) -> None:
    loaded = random_model("tiny")
    asked = request(loaded, 1, 8, 2)
    with llava_prune.pruned(loaded.model, name, **({} if name == "full" else {"tokens": 64})):
        found = operations(loaded.model, asked.prefill, most=3)
    assert found["time"] == "operators" and found["layers"]["number"] == 4
    assert len(found["operations"]) == 3 and found["outside"]["microseconds"] > 0
    assert found["prefill"]["calls"] == {} and found["request"]["launches"] == 0
    times = [o["microseconds"] for o in found["operations"]]
    assert times == sorted(times, reverse=True)
