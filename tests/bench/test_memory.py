"""Peak memory of a pruned prefill is below that of an unpruned one, for every method and budget."""

from __future__ import annotations

from typing import Any

import pytest

import llava_prune
from llava_prune.bench import shapes
from llava_prune.bench.memory import peaks
from llava_prune.bench.request import request
from llava_prune.models.family import family_of

SHAPE = shapes.ModelShape(12, 256, 688, 4, 512, 6, 64, 128, 4)
"""A shape with which every method has a schedule for 192, 128 and 64 of 576 visual tokens."""
NAMES = [n for n in llava_prune.names() if n != "full"] + ["visionzip+autoprune"]


@pytest.fixture(scope="module")
def small() -> Any:
    """Model, request of 660 tokens, language model and the unpruned peaks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "small", SHAPE)
        loaded = shapes.random_model("small")
    asked = request(loaded, 1, 84, 2)
    lm = family_of(loaded.model).language_model(loaded.model)
    return loaded, asked, lm, peaks(asked.prefill, lm, loaded.model.device)


@pytest.mark.parametrize("tokens", [192, 128, 64])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_below_unpruned(name: str, tokens: int, small: Any) -> None:
    """Peaks are bytes that torch allocates on the CPU, see `memory.Peak`."""
    loaded, asked, lm, full = small
    assert full["prefill"] > 12 * 2 * 660 * 256 * 4, "the cache alone"
    budget = {} if name == "text-only" else {"tokens": tokens}
    with llava_prune.pruned(loaded.model, name, **budget):
        cut = peaks(asked.prefill, lm, loaded.model.device)
    assert cut["prefill"] < full["prefill"] and cut["request"] < full["request"], (cut, full)
