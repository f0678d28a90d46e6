"""Caches and positions of a prompt of 650 columns (35 + 576 + 39) in 32 layers, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.golden.reference import LAYERS

N, TEXT = 650, 74
EVERYWHERE = [N] * LAYERS
STAGES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "fastv": ({"layer": 2, "keep": 166}, [650] * 2 + [240] * 30, EVERYWHERE),
    "vtw": ({"layer": 16}, [650] * 16 + [TEXT] * 16, EVERYWHERE),
    "pdrop": ({}, [650] * 8 + [362] * 8 + [218] * 8 + [146] * 8, []),
    "sparsevlm": ({"tokens": 192}, [650] * 3 + [383] * 4 + [278] * 9 + [187] * 16, []),
}
"""Arguments, cache length of each layer after the prompt, position of the first new token (empty: cache length)."""


@pytest.mark.parametrize("name", STAGES)
def test_caches_and_positions(name: str, reference: Any) -> None:
    hyper, lengths, positions = STAGES[name]
    lm = models.language_model(reference.model)
    table = torch.cat(lm.rotary_emb(torch.zeros(1), torch.arange(N + 8)[None]), 2)[0]  # (P, 2 dh)
    seen: list[list[list[int]]] = [[] for _ in range(LAYERS)]

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            rope = torch.cat([x.float() for x in kwargs["position_embeddings"]], 2)[0]
            seen[layer].append(torch.cdist(rope, table).argmin(1).tolist())

        return hook

    given = models.inputs(reference.model, [models.prompt(35, 39)], torch.randn(1, 3, 336, 336))
    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(lm.layers)]
    try:
        with llava_prune.pruned(reference.model, name, **hyper):
            out = models.generate(reference.model, given, 3)
    finally:
        for hook in hooks:
            hook.remove()
    assert models.cache_lengths(out.past_key_values) == [n + 2 for n in lengths]
    first = positions or lengths
    assert [calls[1:] for calls in seen] == [[[p], [p + 1]] for p in first]
    prompts = [calls[0] for calls in seen]
    assert [len(p) for p in prompts] == lengths
    if name == "vtw":
        assert prompts[-1] == [*range(35), *range(611, 650)]
    elif name == "fastv":
        assert prompts[-1][:35] + prompts[-1][-39:] == [*range(35), *range(611, 650)]
    else:
        assert prompts == [list(range(n)) for n in lengths], "positions close up after a cut"
