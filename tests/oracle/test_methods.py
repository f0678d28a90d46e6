"""Every method on every family against the dense replay."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.contract.settings import NAMES
from tests.models import tiny_hf, tiny_llava
from tests.oracle.check import batch, check, full_columns, small, visual_before
from tests.oracle.flash import flash, stand_in


@functools.lru_cache(maxsize=4)
def model_of(family: str, attn: str) -> Any:
    if attn == "flash":
        return flash(tiny_hf())
    return tiny_llava(attn=attn) if family == "llava" else tiny_hf(attn=attn)


@pytest.mark.parametrize("kind", ["pair", "padded"])
@pytest.mark.parametrize(
    "family, attn", [("llava", "sdpa"), ("llava", "eager"), ("hf", "sdpa"), ("hf", "eager"), ("hf", "flash")]
)
@pytest.mark.parametrize("name", NAMES)
def test_pruned_model_equals_dense_model(
    name: str, family: str, attn: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, attn)
    masks = stand_in(monkeypatch)
    given = batch(model, kind)
    method = small(name)
    found = check(model, method, given)
    assert bool(masks) == (attn == "flash")
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
