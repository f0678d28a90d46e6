"""Recorded and fused requests on a real GPU; the stand-in for CUDA graphs on a CPU is in tests/experimental/tape.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import setting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CLOSE = 2e-4


def asked(model: Any, handle: Any, seed: int) -> tuple[Any, list[Any]]:
    given = models.inputs(model, [models.prompt(4, 5)], models.pixels(1, seed=seed))
    out = models.generate(model, given, 5)
    return out, [k.tolist() for k in handle.last.kept]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["full", "autoprune", "autoprune-flash", "fastv", "pdrop", "visionzip", "sparsevlm"])
def test_replays(name: str, fused: bool, tiny: Any) -> None:
    """Three images, four times each, with exact and rounded text lengths, give the ordinary answers."""
    model, hyper = copy.deepcopy(tiny).to("cuda"), setting(name).hyper
    with llava_prune.pruned(model, name, **hyper) as handle:
        expected = [asked(model, handle, seed) for seed in range(3)]
    for text_step in (None, 8):
        with llava_prune.pruned(model, name, graphs=True, text_step=text_step, fused=fused, **hyper) as handle:
            for _ in range(4):
                for seed, (out, kept) in enumerate(expected):
                    got, now = asked(model, handle, seed)
                    assert now == kept
                    torch.testing.assert_close(torch.stack(got.logits), torch.stack(out.logits), rtol=0, atol=CLOSE)
