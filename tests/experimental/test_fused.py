"""Requests with fused cuts keep the same tokens and give the same answers, up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import setting

pytest.importorskip("triton")
METHODS = ["autoprune", "autoprune-flash", "fastv", "pdrop", "sparsevlm", "visionzip+autoprune"]
CASES = [
    *((name, setting(name).hyper) for name in METHODS),
    ("autoprune", {"tokens": 12, "positions": "keep", "recycle": 0.6, "first_score": "none"}),
    ("autoprune", {"tokens": 12, "recycle": 0, "first_score": "text", "first_cap": 1.5}),
]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def model(tiny: Any) -> Any:
    """The model, on a GPU if there is one; elsewhere the kernels are interpreted."""
    return tiny if HERE.type == "cpu" else copy.deepcopy(tiny).to(HERE)


@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_single_prompts(name: str, hyper: dict[str, Any], model: Any) -> None:
    given = models.inputs(model, [models.prompt(4, 5)], models.pixels(1))
    answers, records = [], []
    for fused in (False, True):
        with llava_prune.pruned(model, name, check=True, fused=fused, **hyper) as handle:
            answers.append(models.generate(model, given, 4))
            records.append([k.tolist() for k in handle.last.kept])
    assert records[0] == records[1]
    torch.testing.assert_close(torch.stack(answers[1].logits), torch.stack(answers[0].logits), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_batches(name: str, model: Any) -> None:
    """A batch with equal counts, and a padded batch with different counts, which plain torch computes in part."""
    for rows in ([models.prompt(4, 5), models.prompt(4, 5, seed=2)], [models.prompt(4, 5), models.prompt(9, 2)]):
        given = models.inputs(model, rows, models.pixels(2))
        with torch.inference_mode():
            with llava_prune.pruned(model, name, **setting(name).hyper) as handle:
                plain, kept = model(**given).logits, [k.tolist() for k in handle.last.kept]
            with llava_prune.pruned(model, name, check=True, fused=True, **setting(name).hyper) as handle:
                got = model(**given).logits
                assert [k.tolist() for k in handle.last.kept] == kept
        torch.testing.assert_close(got[:, -1], plain[:, -1], rtol=0, atol=2e-5)


def test_refused_without_a_gpu(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="fused=True needs a CUDA device"):
        llava_prune.attach(tiny, "autoprune", tokens=12, fused=True)
    with llava_prune.pruned(tiny, "autoprune", tokens=12):
        pass  # nothing was changed
