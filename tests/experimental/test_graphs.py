"""Replayed prefills equal ordinary ones. The stand-in for CUDA graphs is in tape.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.experimental import graphs
from tests import models
from tests.contract.settings import NAMES, setting
from tests.experimental.tape import Recorder, asked, same

METHODS = [n for n in NAMES if llava_prune.build(n, **setting(n).hyper).replays]
ABLATIONS: list[dict[str, Any]] = [
    {"positions": "keep", "recycle": 0.6, "first_score": "none"},
    {"recycle": 0, "first_score": "text", "first_cap": 1.5, "fixed_slope": 0.3},
]


def test_some_methods_can_be_replayed() -> None:
    assert {"autoprune", "autoprune-flash", "fastv", "pdrop"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_replays_equal_ordinary_prefills(name: str, tiny: Any, recorder: Recorder) -> None:
    """Three prompts with three images each, four times in turn, are answered as without graphs."""
    hyper = setting(name).hyper
    rows = [models.prompt(4, 5), models.prompt(9, 2, seed=1), models.prompt(4, 5, seed=2)]
    asks = [(row, models.pixels(1, seed=s)) for row in rows for s in range(3)]
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


@pytest.mark.parametrize("hyper", ABLATIONS, ids=["positions kept", "nothing recycled"])
def test_autoprune_with_other_settings(hyper: dict[str, Any], tiny: Any, recorder: Recorder) -> None:
    ask = models.prompt(4, 5), models.pixels(1)
    with llava_prune.pruned(tiny, "autoprune", tokens=12, **hyper) as handle:
        expected = asked(tiny, *ask, handle)
    with llava_prune.pruned(tiny, "autoprune", tokens=12, graphs=True, **hyper) as handle:
        for _ in range(4):
            same(asked(tiny, *ask, handle), expected)
    assert recorder.replayed > recorder.recorded == 2


def test_one_recording_for_each_schedule(tiny: Any, recorder: Recorder) -> None:
    """A rounded slope needs one recording up to the device-to-host copy and one for each schedule."""
    hyper = {**setting("autoprune").hyper, "slope_step": 0.2}
    with torch.inference_mode(), llava_prune.pruned(tiny, "autoprune", graphs=True, **hyper) as handle:
        for _ in range(3):
            slopes = [asked(tiny, models.prompt(4, 5), models.pixels(1, seed=s), handle)["stats"] for s in range(6)]
        different = {tuple(s["scale"]) for s in slopes}
        assert recorder.recorded == 1 + len(different)


@pytest.mark.parametrize("why", ["batch", "padding", "gradient", "no cache"])
def test_other_requests_run_as_ever(why: str, tiny: Any, recorder: Recorder) -> None:
    rows, pixels = [models.prompt(4, 5)] * (2 if why == "batch" else 1), models.pixels(2)
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
        expected = [asked(tiny, models.prompt(3 + n, 4), models.pixels(1), handle) for n in range(3)]
    with llava_prune.pruned(tiny, "fastv", graphs=True, tokens=12) as handle:
        for _ in range(4):
            for n in range(3):
                same(asked(tiny, models.prompt(3 + n, 4), models.pixels(1), handle), expected[n])
    assert recorder.recorded > 3


def test_recordings_outlive_an_attachment(tiny: Any, recorder: Recorder) -> None:
    """Recordings stay valid after detaching, as in the benchmark, which detaches between two pruned requests."""
    method = llava_prune.build("autoprune", **setting("autoprune").hyper)
    mine, row, pixels = graphs.Graphs(method, tiny.device), models.prompt(4, 5), models.pixels(1)
    with llava_prune.pruned(tiny, method) as handle:
        expected = asked(tiny, row, pixels, handle)
    for n in range(graphs.RECORDED + 2):
        with llava_prune.pruned(tiny, method, graphs=mine) as handle:
            same(asked(tiny, row, pixels, handle), expected)
        models.generate(tiny, models.inputs(tiny, [row], pixels), 2)
        assert recorder.recorded == min(n, 2)
    with pytest.raises(ValueError, match="graphs are of"):
        llava_prune.attach(tiny, "autoprune", graphs=mine, tokens=12)


def test_refusals(tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="text_step=0: must be a positive integer"):
        llava_prune.attach(tiny, "fastv", tokens=12, graphs=True, text_step=0)
    with pytest.raises(ValueError, match="text_step=16.*graphs=True"):
        llava_prune.attach(tiny, "fastv", tokens=12, text_step=16)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is on cpu"):
        llava_prune.attach(tiny, "fastv", tokens=12, graphs=True)
    with llava_prune.pruned(tiny, "fastv", tokens=12):
        pass  # nothing was changed


@pytest.mark.parametrize("name", METHODS)
def test_lengths_share_recordings(name: str, tiny: Any, recorder: Recorder) -> None:
    """With a text step of 4, prompts with 1 to 8 text tokens after the image share recordings of two shapes."""
    hyper = setting(name).hyper | ({"slope_step": 0.2} if "autoprune" in name else {})
    asks = [(models.prompt(4, n, seed=n), models.pixels(1)) for n in range(1, 9)]
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        expected = [asked(tiny, *ask, handle) for ask in asks]
    with llava_prune.pruned(tiny, name, graphs=True, text_step=4, **hyper) as handle:
        for n in range(4):
            replayed = recorder.replayed
            for ask, old in zip(asks, expected, strict=True):
                same(asked(tiny, *ask, handle), old, padded=True)
            schedules = {str(x["in"]) for x in expected}
            assert recorder.recorded <= 2 * (1 + len(schedules))
            assert n == 0 or recorder.replayed >= replayed + len(asks)
