"""oneDNN multiplies behind a cut, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Linear

import llava_prune
from llava_prune.runtime import onednn
from llava_prune.runtime.onednn import few_rows
from tests import models

needed = pytest.mark.skipif(onednn.PRODUCT is None, reason="this torch has no oneDNN")


class Counter:
    """Stands before the product and counts its calls by rows."""

    def __init__(self, product: Any) -> None:
        self.product, self.rows = product, []

    def __call__(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.rows.append(x.shape[-2])
        return self.product(x, *rest)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    made = Counter(onednn.PRODUCT)
    monkeypatch.setattr(onednn, "PRODUCT", made)
    return made


@needed
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same(bias: bool, counter: Counter) -> None:
    layer, x = Linear(512, 640, bias=bias), torch.randn(2, 110, 512)
    with torch.no_grad():
        plain = layer(x)
        with few_rows(x):
            got = layer(x)
            turned = layer(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert counter.rows == [110, 110]
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-5)


@needed
@pytest.mark.parametrize("why", ["gradient", "double", "half", "narrow", "switched off", "mixed"])
def test_everything_else_is_left_alone(why: str, counter: Counter) -> None:
    dtype = {"double": torch.float64, "half": torch.bfloat16}.get(why, torch.float32)
    width = 256 if why == "narrow" else 512
    layer, x = Linear(width, 8, dtype=torch.float64 if why == "mixed" else dtype), torch.randn(1, 5, width, dtype=dtype)
    with torch.set_grad_enabled(why == "gradient"), torch.backends.mkldnn.flags(enabled=why != "switched off"):
        with few_rows(x):
            layer(x.double() if why == "mixed" else x)
        layer(x.double() if why == "mixed" else x)
    assert counter.rows == []


@needed
@pytest.mark.parametrize("name", ["autoprune", "fastv", "fastervlm"])
def test_layers_behind_a_cut(name: str, tiny: Any, counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven products in each layer whose sequence is shorter than the prompt; none in the others and in decoding."""
    monkeypatch.setattr(onednn, "WIDTH", 64)
    given = models.inputs(tiny, [models.prompt(4, 5)], models.pictures(1))
    with torch.inference_mode():
        with torch.backends.mkldnn.flags(enabled=False), llava_prune.pruned(tiny, name, tokens=16):
            plain = models.generate(tiny, given, 3)
        assert counter.rows == []
        with llava_prune.pruned(tiny, name, tokens=16) as handle:
            got = models.generate(tiny, given, 3)
            lengths = [9 + n for n in handle.last.tokens_in[0].tolist()]
    assert counter.rows == [n for n in lengths for _ in range(7) if n < 45] != []
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(plain.logits), rtol=0, atol=2e-5)


@needed
def test_what_is_not_cut_is_the_base_model(tiny: Any, counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "WIDTH", 64)
    given = models.inputs(tiny, [models.prompt(4, 5)], models.pictures(1))
    with torch.inference_mode():
        base = tiny(**given).logits
        with llava_prune.pruned(tiny, "autoprune", tokens=models.PATCHES):
            assert torch.equal(tiny(**given).logits, base)
    assert counter.rows == []
