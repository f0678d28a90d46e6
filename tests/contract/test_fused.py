"""Requests with fused cuts keep the same tokens and answer the same, up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import setting
from tests.tape import asked, same

pytest.importorskip("triton")
METHODS = ["autoprune", "autoprune-flash", "fastv", "pdrop", "sparsevlm", "visionzip+autoprune"]


@pytest.mark.parametrize("name", METHODS)
def test_single_prompts(name: str, tiny: Any) -> None:
    row, pixels = models.prompt(4, 5), models.pictures(1)
    with llava_prune.pruned(tiny, name, **setting(name).hyper) as handle:
        expected = asked(tiny, row, pixels, handle)
    with llava_prune.pruned(tiny, name, check=True, fused=True, **setting(name).hyper) as handle:
        same(asked(tiny, row, pixels, handle), expected, padded=True)


@pytest.mark.parametrize("name", METHODS)
def test_batches(name: str, tiny: Any) -> None:
    """Two that keep the same counts, and padding with counts that differ, which plain torch does in part."""
    for rows in ([models.prompt(4, 5), models.prompt(4, 5, seed=2)], [models.prompt(4, 5), models.prompt(9, 2)]):
        given = models.inputs(tiny, rows, models.pictures(2))
        with torch.inference_mode():
            with llava_prune.pruned(tiny, name, **setting(name).hyper) as handle:
                plain, kept = tiny(**given).logits, [k.tolist() for k in handle.last.kept]
            with llava_prune.pruned(tiny, name, check=True, fused=True, **setting(name).hyper) as handle:
                got = tiny(**given).logits
                assert [k.tolist() for k in handle.last.kept] == kept
        torch.testing.assert_close(got[:, -1], plain[:, -1], rtol=0, atol=2e-5)


def test_refused_without_a_gpu(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="fused=True needs a CUDA device"):
        llava_prune.attach(tiny, "autoprune", tokens=12, fused=True)
    with llava_prune.pruned(tiny, "autoprune", tokens=12):
        pass  # nothing was changed
