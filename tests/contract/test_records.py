"""The record `handle.last` agrees with caches, plans and indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import Setting

ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1), models.prompt(2, 9, seed=2)]
TEXT = [len(r) - 1 for r in ROWS]


def run(model: Any, name: str, hyper: Any, rows: Any, pixels: Any, **more: Any) -> tuple[Any, Any]:
    """Return the record and output of a forward in which every cut is checked."""
    with llava_prune.pruned(model, name, check=True, **hyper) as handle, torch.inference_mode():
        out = model(**models.inputs(model, rows, pixels), use_cache=True, **more)
    return handle.last, out


def test_record_and_cache_agree(name: str, chosen: Setting, tiny: Any) -> None:
    last, out = run(tiny, name, chosen.hyper, ROWS, models.pixels(3))
    assert last.tokens_in.shape == last.tokens_out.shape == (3, models.LAYERS)
    assert last.tokens_in.dtype == last.tokens_out.dtype == torch.long
    assert torch.equal(last.tokens_out[:, :-1], last.tokens_in[:, 1:])
    if chosen.prunes:
        assert (last.tokens_out.sum(1) < models.PATCHES * models.LAYERS).all()
    else:
        assert (last.tokens_out == models.PATCHES).all()
    columns = (last.tokens_in + torch.tensor(TEXT)[:, None]).amax(0)
    lengths = models.cache_lengths(out.past_key_values)
    if last.tokens_in[0, 0] < models.PATCHES:  # a cut removes padding
        assert lengths == columns.tolist()
    else:
        assert lengths[0] == max(TEXT) + models.PATCHES
        assert all(n in (c, lengths[0]) for n, c in zip(lengths, columns.tolist(), strict=True))
    assert out.logits.isfinite().all()


def test_kept_indices(name: str, hyper: Any, tiny: Any) -> None:
    last, _ = run(tiny, name, hyper, ROWS, models.pixels(3))
    assert len(last.kept) == models.LAYERS
    for layer, kept in enumerate(last.kept):
        assert kept.dtype == torch.long
        counts = (kept != llava_prune.methods.views.PADDING).sum(1)
        assert counts.tolist() == last.tokens_out[:, layer].tolist()
        assert kept.shape[1] == counts.max()
        assert ((kept < models.PATCHES) & (kept >= llava_prune.methods.views.PADDING)).all()
        for row in kept:
            real = row[row >= 0]
            assert real.unique().numel() == real.numel()
            padding = (row == llava_prune.methods.views.PADDING).long()
            assert torch.equal(padding, padding.sort().values)  # at the end
    for early, late in zip(last.kept, last.kept[1:], strict=False):
        for a, b in zip(early, late, strict=True):
            assert set(b[b >= 0].tolist()) <= set(a[a >= 0].tolist())


def test_survival_counts_the_layers_that_a_token_leaves(name: str, hyper: Any, tiny: Any) -> None:
    last, _ = run(tiny, name, hyper, ROWS, models.pixels(3))
    assert last.survival.shape == (3, models.PATCHES)
    for sample, survival in enumerate(last.survival.tolist()):
        for index, layers in enumerate(survival):
            assert layers == sum(index in kept[sample].tolist() for kept in last.kept)


def test_plan_is_what_happens(name: str, hyper: Any, tiny: Any) -> None:
    plan = llava_prune.build(name, **hyper).plan(models.PATCHES, models.LAYERS)
    if plan is None:
        pytest.skip(f"the data decide what {name} keeps")
    last, out = run(tiny, name, hyper, ROWS[:1], models.pixels(1))
    assert last.tokens_in.tolist() == [plan]
    assert models.cache_lengths(out.past_key_values) == [n + TEXT[0] for n in plan]


def test_statistics_are_floats_of_each_sample(name: str, hyper: Any, tiny: Any) -> None:
    last, _ = run(tiny, name, hyper, ROWS, models.pixels(3))
    assert isinstance(last.stats, dict)
    for values in last.stats.values():
        assert len(values) == 3
        assert all(isinstance(v, float) and v == v and abs(v) < float("inf") for v in values)


def test_runs_repeat_bit_for_bit(name: str, hyper: Any, tiny: Any) -> None:
    first, out = run(tiny, name, hyper, ROWS, models.pixels(3))
    second, again = run(tiny, name, hyper, ROWS, models.pixels(3))
    assert torch.equal(out.logits, again.logits)
    assert all(torch.equal(a, b) for a, b in zip(first.kept, second.kept, strict=True))


def test_the_cache_may_be_off(name: str, hyper: Any, tiny: Any) -> None:
    last, out = run(tiny, name, hyper, ROWS, models.pixels(3))
    with llava_prune.pruned(tiny, name, **hyper) as handle, torch.inference_mode():
        bare = tiny(**models.inputs(tiny, ROWS, models.pixels(3)), use_cache=False)
    assert bare.past_key_values is None
    assert torch.equal(handle.last.tokens_out, last.tokens_out)
    assert torch.allclose(bare.logits[:, -1], out.logits[:, -1], atol=1e-4)


def test_text_alone_is_the_base_model(name: str, hyper: Any, tiny: Any, logits: Any) -> None:
    given = models.inputs(tiny, [[1, 5, 6, 7], [1, 9]])
    base, answer = logits(tiny, given), models.generate(tiny, given)
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        logits(tiny, models.inputs(tiny, ROWS[:1], models.pixels(1)))
        record = handle.last
        assert torch.equal(logits(tiny, given), base)
        assert record is not None and handle.last is record, "the record is that of the last request with images"
        again = models.generate(tiny, given)
    assert torch.equal(again.sequences, answer.sequences)
    assert torch.equal(again.logits[0], answer.logits[0])


def test_captures_are_refused(name: str, hyper: Any, tiny: Any) -> None:
    given = models.inputs(tiny, ROWS[:1], models.pixels(1))
    with llava_prune.pruned(tiny, name, **hyper), pytest.raises(ValueError, match="output_hidden_states"):
        tiny(**given, output_hidden_states=True)
