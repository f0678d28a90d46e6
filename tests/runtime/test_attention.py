"""Attention rows beside the layer: a slice of columns, the same columns one by one, and eager attention agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_prune.runtime.attention import decoder_attention
from tests import models

LENGTH = 14


@pytest.mark.parametrize("rows", [slice(9, 14), slice(13, 14), slice(3, 8), slice(0, 14)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_slices_equal_numbers_and_eager(rows: slice, padded: bool, tiny_models: dict[str, Any]) -> None:
    lm = models.language_model(tiny_models["hf"])
    layer, draw = lm.layers[2], torch.Generator().manual_seed(0)
    hidden = torch.randn(2, LENGTH, models.WIDTH, generator=draw)
    places = torch.arange(LENGTH)
    rope = lm.rotary_emb(hidden, places[None])
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, :2] = not padded
    given = valid if padded else None
    with torch.no_grad():
        got = decoder_attention(layer, hidden, rope, rows, given)
        numbers = decoder_attention(layer, hidden, rope, places[rows], given)
        states, heads = layer.input_layernorm(hidden), models.HEADS
        query, key = (f(states).view(2, LENGTH, heads, -1) for f in (layer.self_attn.q_proj, layer.self_attn.k_proj))

        def turned(x: torch.Tensor) -> torch.Tensor:
            half = x.shape[-1] // 2
            spun = torch.cat([-x[..., half:], x[..., :half]], -1)
            return x * rope[0][:, :, None] + spun * rope[1][:, :, None]

        score = torch.einsum("bqhd,bkhd->bhqk", turned(query), turned(key)) * layer.self_attn.scaling
        seen = (places[None] <= places[:, None]) & valid[:, None, None]
        expected = score.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, rows]
    assert torch.equal(got, numbers)
    alive = valid[:, rows]  # a padded row sees nothing
    for b in range(2):
        assert torch.allclose(got[b][:, alive[b]], expected[b][:, alive[b]], atol=1e-6)
