"""Peak memory of a request and of its prefill."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Peak:
    """The peak of allocated bytes between `start` and `stop`, minus the bytes allocated at the start.

    On a GPU the CUDA allocator's count is used. On a CPU it is the running sum of the allocations and frees recorded by
    torch's profiler. This sum is exact for tensors and for buffers that kernels allocate through torch; it omits memory
    that a library allocates itself.

    Attributes:
        bytes: the peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._before = 0
        self._profile: Any = None

    def start(self, *_: Any) -> None:
        """Start measuring; also usable as a forward pre-hook."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.start()

    def stop(self, *_: Any) -> None:
        """Stop measuring and set `bytes`; also usable as a forward hook."""
        if self.device.type == "cuda":
            self.bytes = int(torch.cuda.max_memory_allocated(self.device) - self._before)
            return
        self._profile.stop()
        self.bytes = _highest(self._profile)


def peaks(call: Callable[[], Any], lm: nn.Module, device: torch.device) -> dict[str, int]:
    """Return the peak bytes of `call` and of the language model in it, measured in two separate calls.

    Args:
        call: a prefill that calls `lm` once.
        lm: the language model.
        device: device of the model.

    Returns:
        {"request": bytes above those allocated before the call, "prefill": bytes above those allocated at entry of
        `lm`}.
    """
    gc.collect()
    whole, inner = Peak(device), Peak(device)
    whole.start()
    call()
    whole.stop()
    gc.collect()
    hooks = [lm.register_forward_pre_hook(inner.start), lm.register_forward_hook(inner.stop)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return {"request": whole.bytes, "prefill": inner.bytes}


def _highest(profile: Any) -> int:
    """Return the largest running sum of the allocations (positive) and frees (negative) of a profile."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
