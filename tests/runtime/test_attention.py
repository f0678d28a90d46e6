"""Attention rows computed outside the layer: a slice of rows, the same rows by number, and eager attention agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import llava_prune
from llava_prune.models.family import family_of
from llava_prune.models.parallel import split
from llava_prune.runtime.attention import decoder_attention
from tests import combinations, models

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


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("language", combinations.LANGUAGES)
def test_equals_the_stock_eager_attention(language: str, cached: bool) -> None:
    """Attention rows equal the attention maps of every architecture, with biases, head norms and grouped keys."""
    lm = combinations.build("llava", language, attn="eager").model.language_model
    hidden = torch.randn(2, LENGTH, models.WIDTH, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, :3] = False
    with torch.no_grad():
        out = lm(
            inputs_embeds=hidden,
            attention_mask=valid.long(),
            output_attentions=True,
            output_hidden_states=True,
            use_cache=cached,
        )
        rope = lm.rotary_emb(hidden, torch.arange(LENGTH)[None])
        for i, layer in enumerate(lm.layers):
            keys = out.past_key_values.layers[i].keys if cached else None
            got = decoder_attention(layer, out.hidden_states[i], rope, slice(5, LENGTH), valid, keys)
            assert torch.allclose(got, out.attentions[i][:, :, 5:], atol=2e-6)
            assert float(got.amax()) > 0.5, "attention is too flat to tell architectures apart"


def test_what_only_llama_was_tested_with_is_refused() -> None:
    model = combinations.build("llava", "qwen3")
    with pytest.raises(ValueError, match="graphs, fused. is tested with Llama language models only, and this one is Q"):
        llava_prune.attach(model, "uniform", tokens=8, fused=True)
    with pytest.raises(ValueError, match="engine='tp' is tested with Llama language models only.*use device_map"):
        split(model, family_of(model), "tp", torch.float32)


def window(language: str, **text: Any) -> Any:
    given = combinations.config("llava", language, text={"sliding_window": 16, **text})
    return transformers.LlavaForConditionalGeneration(given)


@pytest.mark.parametrize("language", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_is_refused(language: str) -> None:
    model = window(language, **({} if language == "mistral" else {"use_sliding_window": True, "max_window_layers": 0}))
    with pytest.raises(ValueError, match="sliding window of 16 tokens, which is not supported.*set .*sliding_window"):
        llava_prune.attach(model, "uniform", tokens=8)


def test_a_window_that_no_layer_uses_is_accepted() -> None:
    with llava_prune.pruned(window("qwen2", use_sliding_window=False), "uniform", tokens=8) as handle:
        assert handle.attached
