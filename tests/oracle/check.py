"""Run a pruned request, replay it densely, and compare everything that can be observed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

import llava_prune
from llava_prune.methods.registry import resolve
from tests.models import PATCHES, VOCAB, cache_lengths, generate, inputs, pixels, prompt
from tests.oracle.dense import Replay, Watch, near, replay, spliced

ARGUMENTS: dict[str, dict[str, Any]] = {  # a first layer with all of an anyres image costs 20 tokens on average
    "fastv": {"tokens": 30},
    "pdrop": {"tokens": 30},
    "topv": {"tokens": 30},
    "dart": {"tokens": 30},
    "fastervlm+topv": {"tokens": 30, "vision_tokens": 33},
    "prumerge++pdrop": {"tokens": 20},
}
"""Arguments of methods on six layers and 36 patches, where `tokens=9` or the defaults do not work."""
STEPS = 3


def small(name: str) -> Any:
    """Return a new instance of a method that prunes the small models."""
    known = inspect.signature(resolve(name)[0]).parameters
    values = {"tokens": 9} if "tokens" in known else {}
    return llava_prune.build(name, **{**values, **ARGUMENTS.get(name, {})})


def batch(model: Any, kind: str) -> dict[str, Any]:
    """Return "one" sample, a "pair" of equal lengths, or "padded": one, two and no images, and no text after one."""
    if kind == "one":
        return inputs(model, [prompt(5, 7)], pixels(1))
    if kind == "pair":
        return inputs(model, [prompt(5, 7), prompt(4, 8, seed=1)], pixels(2))
    assert kind == "padded"
    rows = [prompt(4, 6), prompt(6, 11, images=2, seed=1), prompt(12, 5, images=0, seed=2), prompt(9, 0, seed=3)]
    return inputs(model, rows, pixels(4))


def check_record(record: Any, found: Replay) -> None:
    """Compare token counts and kept indices with the replay."""
    assert record.tokens_in.tolist() == [[v for _, v in s.entering] for s in found.samples]
    assert record.tokens_out.tolist() == [[len(x) for x in s.leaving] for s in found.samples]
    for n, kept in enumerate(record.kept):
        for row, sample in zip(kept.tolist(), found.samples, strict=True):
            real = [i for i in row if i != -2]
            assert real == sample.leaving[n]
            assert row == real + [-2] * (len(row) - len(real)), "padding goes last"


def check(
    model: Any, method: Any, given: dict[str, Any], steps: int = STEPS, tol: float = 1e-4, **options: Any
) -> Replay:
    """Generate pruned and compare with the dense replay: logits, cache lengths, token counts, kept indices."""
    watch = Watch(method)
    with llava_prune.pruned(model, method) as handle:
        out = generate(model, given, steps + 1, **options)
        record = handle.last
        assert record is not None
        record.tokens_out  # noqa: B018  # asks for the last layer's cut, which the replay needs
    return compare(model, watch, record, out, given, steps, tol)


def compare(model: Any, watch: Watch, record: Any, out: Any, given: dict[str, Any], steps: int, tol: float) -> Replay:
    """Compare a request that was run already with the dense replay."""
    features = None if watch.vision is None or watch.vision.ids is not None else watch.vision.features
    found = replay(model, spliced(model, given, features), watch, out.sequences[:, :steps].tolist(), tol=2 * tol)
    for b, sample in enumerate(found.samples):
        got = torch.stack([step[b] for step in out.logits])
        assert got.shape == (steps + 1, model.lm_head.out_features)
        near(got, sample.logits, tol, f"logits of sample {b}")
    assert cache_lengths(out.past_key_values) == [c + steps for c in found.columns]
    check_record(record, found)
    return found


def full_columns(model: Any, given: dict[str, Any]) -> int:
    """Return the number of columns of the unpruned prompt."""
    return spliced(model, given).valid.shape[1]


def visual_before(given: dict[str, Any]) -> list[int]:
    """Return the visual tokens of each sample before any cut, with 36 tokens an image."""
    ids: Tensor = given["input_ids"]
    if "images" in given:
        return ((ids == -200).sum(1) * PATCHES).tolist()
    return (ids == VOCAB).sum(1).tolist()
