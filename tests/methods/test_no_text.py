"""Prompts that end with their image, against attention computed from the weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.methods.autoprune import schedule
from tests import models
from tests.oracle.dense import Dense, _norm, spliced

BEFORE = 7
ROW = models.prompt(BEFORE, 0)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny_hf()


@pytest.fixture(scope="module")
def given(model: Any) -> Any:
    return models.inputs(model, [ROW], models.pixels(1))


def last_attention(model: Any, given: Any, layer: int) -> torch.Tensor:
    """Return (36,) attention of the last position, a visual token, on the image in an unpruned layer, head mean."""
    dense, prompt = Dense(model), spliced(model, given)
    states = prompt.embeds[0].double()
    positions = torch.arange(len(states))
    for i in range(layer):
        states, _ = dense.layer(i, states, positions)
    normed = _norm(dense.lm.layers[layer].input_layernorm, states)
    _, weight = dense.attention(layer, normed, positions)
    return weight[:, -1, BEFORE:].mean(0)


def best(score: torch.Tensor, count: int) -> list[int]:
    return sorted(score.argsort(descending=True)[:count].tolist())


def kept(model: Any, given: Any, method: str, **hyper: Any) -> Any:
    with torch.inference_mode(), llava_prune.pruned(model, method, **hyper) as handle:
        model(**given)
        return handle.last


def test_fastv_ranks_by_the_last_visual_token(model: Any, given: Any) -> None:
    record = kept(model, given, "fastv", layer=2, keep=9)
    assert record.kept[1].tolist() == [best(last_attention(model, given, 1), 9)]


def test_pyramiddrop_ranks_by_the_last_visual_token(model: Any, given: Any) -> None:
    record = kept(model, given, "pdrop", layers=[2], ratios=[0.25])
    assert record.kept[1].tolist() == [best(last_attention(model, given, 2), 9)]


def test_sparsevlm_has_the_last_visual_token_for_its_rater(model: Any, given: Any) -> None:
    record = kept(model, given, "sparsevlm", layers=[1], retain=[9], version="2.0", heads=4)
    plain = kept(model, given, "sparsevlm", layers=[1], retain=[9])
    assert len(record.kept[1][0]) == 9
    merged = plain.kept[1][0]
    assert merged[merged >= 0].tolist() == best(last_attention(model, given, 1), 9)


def test_autoprune_has_no_information(model: Any, given: Any) -> None:
    """Without text, I0 = I1 = 0: layer 0 ranks by the class token alone, and the slope is k0."""
    record = kept(model, given, "autoprune", tokens=9, mi_scale=50)
    assert record.stats["mi0"] == record.stats["mi1"] == [0.0] and record.stats["slope"] == [0.4]
    plan = schedule(0.4, 9, models.PATCHES, models.LAYERS, 14.9 * models.LAYERS / 32)
    assert record.tokens_out.tolist() == [list(plan.leaving)]
    seen: dict[str, Any] = {}
    attention = model.model.vision_tower.encoder.layers[2].self_attn
    attention.config._attn_implementation = "eager"
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(weights=output[1]))
    try:
        with torch.inference_mode():
            model(**given)
    finally:
        hook.remove()
    assert record.kept[0].tolist() == [best(seen["weights"][0, :, 0, 1:].mean(0), 22)]


def test_text_changes_all_of_it(model: Any) -> None:
    """With text after the image, the mutual information is not zero and the slope is not k0."""
    other = models.inputs(model, [models.prompt(BEFORE, 6)], models.pixels(1))
    record = kept(model, other, "autoprune", tokens=9, mi_scale=50)
    assert record.stats["mi0"] != [0.0] and record.stats["slope"] != [0.4]
