"""A stand-in for CUDA graphs, and functions that compare requests with and without it.

The tests need no CUDA: a tape keeps every operation with the tensors that it read and wrote, and repeats the operations
on the same memory, as a CUDA graph does. Device-to-host copies and data from the host break a tape, as they break a
capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import models


class Tape(TorchDispatchMode):
    """Records operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "lift_fresh" in name:
            raise RuntimeError(f"{name} cannot be captured: it reads the device, or brings data from the host")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            new = func(*args, **kwargs)
            for a, b in zip(_tensors(out), _tensors(new), strict=True):
                if a.untyped_storage().data_ptr() not in given:  # views and tensors written in place are up to date
                    a.copy_(b)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.numel()]


class Recorder:
    """Records and replays runs, and counts both. Overwrites what a recording computed: a capture computes nothing."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0  # pieces of prefills
        self.steps = self.stepped = 0  # decoding steps

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape, token = Tape(), "Steps" in run.__qualname__
        run()
        with tape:
            out = run()
        for _, args, kwargs, made in tape.steps:
            given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            for x in _tensors(made):
                if x.untyped_storage().data_ptr() not in given:
                    x.fill_(1)
        self.recorded, self.steps = self.recorded + (not token), self.steps + token

        def replay() -> None:
            self.replayed, self.stepped = self.replayed + (not token), self.stepped + token
            tape.replay()

        return out, replay


def asked(model: Any, row: Any, pixels: Any, handle: Any, steps: int = 4) -> dict[str, Any]:
    """Return a greedy answer with its logits, cache and record."""
    out = models.generate(model, models.inputs(model, [row], pixels), steps)
    last = handle.last
    return {
        "logits": torch.stack(out.logits),
        "cache": out.past_key_values,
        "in": last.tokens_in.tolist(),
        "out": last.tokens_out.tolist(),
        "kept": [k.tolist() for k in last.kept],
        "stats": last.stats,
    }


def same(a: dict[str, Any], b: dict[str, Any], padded: bool = False) -> None:
    """Check that two answers are equal: prefills exactly unless `padded`, decoding steps up to rounding."""
    torch.testing.assert_close(a["logits"], b["logits"], rtol=0, atol=2e-5)
    assert padded or torch.equal(a["logits"][0], b["logits"][0])
    steps = len(a["logits"]) - 1
    for old, new in zip(a["cache"].layers, b["cache"].layers, strict=True):
        for x, y in ((old.keys, new.keys), (old.values, new.values)):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
            assert padded or torch.equal(x[:, :, :-steps], y[:, :, :-steps])
    for name in ("in", "out", "kept"):
        assert a[name] == b[name], name
    for name, values in a["stats"].items():
        assert b["stats"][name] == (pytest.approx(values, abs=1e-5) if padded else values), name
