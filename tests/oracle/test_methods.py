"""Every method on every family against the dense replay."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.contract.settings import NAMES
from tests.models import tiny_hf, tiny_llava
from tests.oracle.check import batch, check, full_columns, small, visual_before


@functools.lru_cache(maxsize=4)
def model_of(family: str, attn: str) -> Any:
    return tiny_llava(attn=attn) if family == "llava" else tiny_hf(attn=attn)


@pytest.mark.parametrize("kind", ["pair", "padded"])
@pytest.mark.parametrize("family, attn", [("llava", "sdpa"), ("llava", "eager"), ("hf", "sdpa"), ("hf", "eager")])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_model_equals_dense_model(name: str, family: str, attn: str, kind: str) -> None:
    model = model_of(family, attn)
    given = batch(model, kind)
    method = small(name)
    found = check(model, method, given)
    before = visual_before(given)
    for b, sample in enumerate(found.samples):
        left = [len(n) for n in sample.leaving]
        if name == "full":
            assert left == [before[b]] * 6
        else:
            assert (min(left) < before[b]) == (before[b] > 0)
    if name == "full":
        assert found.columns == [full_columns(model, given)] * 6
    else:
        assert found.columns[-1] < full_columns(model, given) or left[-1] < left[0]
