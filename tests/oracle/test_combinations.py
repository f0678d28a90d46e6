"""Many combinations of class, language model and vision tower against the dense replay."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import llava_prune
from tests import combinations
from tests.models import SIDE, crops, generate, inputs, prompt
from tests.oracle.check import batch, check
from tests.oracle.scripted import Scripted

COMBINATIONS = [
    ("llava", "mistral", "clip"),
    ("llava", "qwen2", "siglip"),
    ("llava", "qwen3", "clip"),
    ("llava", "llama", "dinov2"),
    ("next", "llama", "clip"),
    ("next", "mistral", "clip"),
    ("next", "qwen2", "siglip"),
    ("onevision", "qwen2", "siglip"),
]
SIZES = [(3 * SIDE, SIDE), (SIDE, 2 * SIDE - 11)]
SCRIPT = {-1: (0.9, 0), 1: (0.7, 2), 2: (0.6, 1), 3: (0.5, 0)}
INSIDE = ("autoprune", "fastv", "pdrop", "sparsevlm", "topv", "vtw")
BEFORE = ("fastervlm", "visionzip", "prumerge+", "tome")


@functools.lru_cache(maxsize=len(COMBINATIONS))
def model_of(kind: str, language: str, tower: str) -> Any:
    return combinations.build(kind, language, tower)


def request(kind: str, model: Any) -> dict[str, Any]:
    """Return a batch: with padding, two images and none, or with two images in different numbers of crops."""
    if kind == "llava":
        return batch(model, "padded")
    return inputs(model, [prompt(4, 6), prompt(6, 9, seed=1)], [crops(s, seed=i) for i, s in enumerate(SIZES)], SIZES)


@pytest.mark.parametrize("vision", [0, 3])
@pytest.mark.parametrize("kind, language, tower", COMBINATIONS)
def test_the_runtime_equals_the_dense_model(kind: str, language: str, tower: str, vision: int) -> None:
    model = model_of(kind, language, tower)
    found = check(model, Scripted(SCRIPT, "renumber", "cache", vision), request(kind, model), steps=2)
    assert found.columns[0] > found.columns[-1]


def method_of(name: str, kind: str, tower: str) -> Any:
    """Return a method with a budget that prunes the small models, with the substitute where the tower needs it."""
    many = 3 if kind == "llava" else 8
    hyper: dict[str, Any] = {"tokens": 9 * many} if name != "vtw" else {}
    if name in ("autoprune", "fastervlm") and tower != "clip":
        hyper["class_token"] = "received"
    return llava_prune.build(name, **hyper)


def refused(model: Any, method: Any, kind: str, tower: str) -> bool:
    """Return whether the model lacks what a method needs; check that `attach` refuses it then."""
    without = "class token" in method.requires and tower != "clip"
    if not without and ("whole images" not in method.requires or kind == "llava"):
        return False
    with pytest.raises(ValueError, match="class token of a CLIP tower|cannot work on images in crops"):
        llava_prune.attach(model, method)
    return True


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind, language, tower", COMBINATIONS)
def test_methods_equal_the_dense_model(kind: str, language: str, tower: str, name: str) -> None:
    model, method = model_of(kind, language, tower), method_of(name, kind, tower)
    found = check(model, method, request(kind, model), steps=1)
    left = [len(kept) for kept in found.samples[0].leaving]
    assert left[-1] < found.samples[0].entering[0][1]


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("kind, language, tower", COMBINATIONS)
def test_methods_before_the_language_model(kind: str, language: str, tower: str, name: str) -> None:
    """Whole images equal the dense model; with crops, fewer tokens enter (tests/twin compares which)."""
    model, method = model_of(kind, language, tower), method_of(name, kind, tower)
    if refused(model, method, kind, tower):
        return
    given = request(kind, model)
    if kind == "llava":
        check(model, method, given, steps=1)
        return
    counts = {}
    for each in (method, llava_prune.build("full")):
        with llava_prune.pruned(model, each, check=True) as handle:
            assert all(step.isfinite().all() for step in generate(model, given, 2).logits)
            counts[each.name] = handle.last.tokens_in[:, 0]
    assert (counts[name] < counts["full"]).all()
