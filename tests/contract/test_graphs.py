"""Replayed prefills equal prefills that run as ever.

No CUDA here: a tape stands in for CUDA graphs. It keeps every operation with the tensors it read and wrote, and does
them again on the same memory, which is what a graph does; reads of the device and data from the host break it, as they
break a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llava_prune
from llava_prune.runtime import graphs
from tests import models
from tests.contract.settings import NAMES, setting

METHODS = [n for n in NAMES if llava_prune.build(n, **setting(n).hyper).replays]


class Tape(TorchDispatchMode):
    """Records while it is entered."""

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
                if a.untyped_storage().data_ptr() not in given:  # a view, or written in place, is there already
                    a.copy_(b)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.numel()]


class Recorder:
    """Counts what it records and replays; spoils what a recording computed, for a capture computes nothing."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape = Tape()
        run()
        with tape:
            out = run()
        for _, args, kwargs, made in tape.steps:
            given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            for x in _tensors(made):
                if x.untyped_storage().data_ptr() not in given:
                    x.fill_(1)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return out, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: made)
    return made


def asked(model: Any, row: Any, pixels: Any, handle: Any, steps: int = 4) -> dict[str, Any]:
    """A greedy answer with its logits, cache and record."""
    out = models.generate(model, models.inputs(model, [row], pixels), steps)
    last, cache = handle.last, out.past_key_values
    return {
        "logits": torch.stack(out.logits),
        "caches": [(x.keys, x.values) for x in cache.layers],
        "in": last.tokens_in.tolist(),
        "out": last.tokens_out.tolist(),
        "kept": [k.tolist() for k in last.kept],
        "stats": last.stats,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert torch.equal(a["logits"], b["logits"])
    for (k, v), (k2, v2) in zip(a["caches"], b["caches"], strict=True):
        assert torch.equal(k, k2) and torch.equal(v, v2)
    for name in ("in", "out", "kept", "stats"):
        assert a[name] == b[name], name


def test_some_methods_can_be_replayed() -> None:
    assert {"autoprune", "autoprune-flash", "fastv", "pdrop"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_replays_equal_ordinary_prefills(name: str, tiny: Any, recorder: Recorder) -> None:
    """Three lengths and three pictures, each asked five times; answers stay as they are while others are replayed."""
    hyper = setting(name).hyper
    rows = [models.prompt(4, 5), models.prompt(9, 2, seed=1), models.prompt(4, 5, seed=2)]
    asks = [(row, models.pictures(1, seed=s)) for row in rows for s in range(3)]
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        expected = [asked(tiny, *ask, handle) for ask in asks]
    assert recorder.recorded == 0
    with llava_prune.pruned(tiny, name, graphs=True, **hyper) as handle:
        for _ in range(3):
            got = [asked(tiny, *ask, handle) for ask in asks]
            for a, b in zip(got, expected, strict=True):
                same(a, b)
        recorded = recorder.recorded
        got = [asked(tiny, *ask, handle) for ask in asks]
        for a, b in zip(got, expected, strict=True):
            same(a, b)
        assert recorder.recorded == recorded, "everything was known by now"
        assert recorder.replayed > recorded > 0


def test_one_recording_for_each_schedule(tiny: Any, recorder: Recorder) -> None:
    """A rounded slope needs one piece up to the read and one for each schedule."""
    hyper = {**setting("autoprune").hyper, "slope_step": 0.2}
    with torch.inference_mode(), llava_prune.pruned(tiny, "autoprune", graphs=True, **hyper) as handle:
        for _ in range(3):
            slopes = [asked(tiny, models.prompt(4, 5), models.pictures(1, seed=s), handle)["stats"] for s in range(6)]
        different = {tuple(s["scale"]) for s in slopes}
        assert recorder.recorded == 1 + len(different)


@pytest.mark.parametrize("why", ["batch", "padding", "gradient", "no cache"])
def test_other_requests_run_as_ever(why: str, tiny: Any, recorder: Recorder) -> None:
    rows, pixels = [models.prompt(4, 5)] * (2 if why == "batch" else 1), models.pictures(2)
    given = models.inputs(tiny, rows, pixels[: len(rows)])
    if why == "padding":
        given = models.inputs(tiny, [models.prompt(4, 5), models.prompt(9, 2)], pixels)
    more = {"use_cache": False} if why == "no cache" else {}
    with llava_prune.pruned(tiny, "fastv", graphs=True, tokens=12), torch.set_grad_enabled(why == "gradient"):
        for _ in range(3):
            tiny(**given, **more)
    assert recorder.recorded == 0


def test_recordings_are_dropped_at_the_limit(tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    with llava_prune.pruned(tiny, "fastv", tokens=12) as handle:
        expected = [asked(tiny, models.prompt(3 + n, 4), models.pictures(1), handle) for n in range(3)]
    with llava_prune.pruned(tiny, "fastv", graphs=True, tokens=12) as handle:
        for _ in range(4):
            for n in range(3):
                same(asked(tiny, models.prompt(3 + n, 4), models.pictures(1), handle), expected[n])
    assert recorder.recorded > 3


def test_recordings_outlive_an_attachment(tiny: Any, recorder: Recorder) -> None:
    """As the bench uses them, which detaches between two pruned requests."""
    method = llava_prune.build("autoprune", **setting("autoprune").hyper)
    mine, row, pixels = graphs.Graphs(method, tiny.device), models.prompt(4, 5), models.pictures(1)
    with llava_prune.pruned(tiny, method) as handle:
        expected = asked(tiny, row, pixels, handle)
    for n in range(graphs.RECORDED + 2):
        with llava_prune.pruned(tiny, method, graphs=mine) as handle:
            same(asked(tiny, row, pixels, handle), expected)
        models.generate(tiny, models.inputs(tiny, [row], pixels), 2)
        assert recorder.recorded == min(n, 2)
    with pytest.raises(ValueError, match="recordings are of"):
        llava_prune.attach(tiny, "autoprune", graphs=mine, tokens=12)


def test_refusals(tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="replays"):
        llava_prune.attach(tiny, "random", tokens=12, graphs=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is on cpu"):
        llava_prune.attach(tiny, "fastv", tokens=12, graphs=True)
    with llava_prune.pruned(tiny, "fastv", tokens=12):
        pass  # nothing was changed
