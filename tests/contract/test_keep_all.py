"""Every method with nothing to prune is the unpruned model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import models


@pytest.mark.parametrize("name", ["full", "autoprune", "random", "uniform"])
def test_keep_all_equals_the_base_model_bit_for_bit(name: str, tiny: Any, logits: Any) -> None:
    given = models.inputs(tiny, [models.prompt(4, 5)], models.pictures(1))
    base = logits(tiny, given)
    hyper = {} if name == "full" else {"tokens": models.PATCHES}
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        assert torch.equal(logits(tiny, given), base)
        assert handle.last.tokens_out.tolist() == [[models.PATCHES] * models.LAYERS]
    assert torch.equal(logits(tiny, given), base)
