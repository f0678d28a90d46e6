"""Details of methods that change a result and are easily lost, each against expected values of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from llava_prune import Spans, View, VisionView
from llava_prune.methods.autoprune import schedule
from llava_prune.methods.prumerge import absorb
from tests import models


def test_autoprune_not_strict_moves_nothing() -> None:
    """A single token that a layer drops and recycles moves to the end as a merged token if strict, else it stays."""
    model = models.tiny_hf()
    given = models.inputs(model, [models.prompt(5, 7)], models.pixels(1))
    records = {}
    for strict in (True, False):
        with llava_prune.pruned(model, "autoprune", tokens=20, k0=0, strict=strict) as handle:
            models.generate(model, given, 2)
            records[strict] = handle.last
    plan = schedule(0.0, 20, models.PATCHES, models.LAYERS, 14.9 * models.LAYERS / 32)
    moves = [i for i in range(models.LAYERS) if (plan.recycle[i], plan.merged[i]) == (1, 1)]
    assert moves, "the schedule has such a layer"
    assert records[True].tokens_out.tolist() == records[False].tokens_out.tolist() == [list(plan.leaving)]
    for i in moves:
        assert records[True].kept[i][0, -1] == -1
        assert torch.equal(records[False].kept[i], records[False].kept[i - 1])


def crops_view(crops: int, patches: int) -> VisionView:
    """Return a view of `crops` crops of an image that may have up to five."""
    draw = torch.Generator().manual_seed(0)
    attention = torch.rand(crops, 2, 1, 1 + patches, generator=draw)
    keys = torch.randn(crops, 2, 1 + patches, 4, generator=draw)
    features = torch.randn(crops, patches, 8, generator=draw)
    queries, cls = torch.randn(crops, 2, 1, 4, generator=draw), torch.randn(crops, 8, generator=draw)
    return VisionView(features, {0: attention}, {0: keys}, (1, patches), {0: queries}, cls, crops=5)


@pytest.mark.parametrize("tokens, each", [(145, 29), (146, 29), (149, 29), (150, 30), (4, 1)])
@pytest.mark.parametrize("name, more", [("fastervlm", 0), ("visionzip", 0), ("prumerge", 1)])
def test_budgets_that_crops_do_not_divide(name: str, more: int, tokens: int, each: int) -> None:
    """Each crop keeps floor(tokens / 5), at least 1; PruMerge adds its merged token."""
    method = llava_prune.build(name, tokens=tokens)
    for crops in (5, 3):
        cut = method.prune_vision(crops_view(crops, 40))
        assert cut is not None
        assert cut.live.sum(1).tolist() == list(cut.counts) == [each + more] * crops


def request(now: list[int]) -> View:
    """Return a view of three samples with `now` visual tokens each."""
    visual = torch.ones(3, max(now), dtype=torch.bool)
    spans = Spans(max(now), 1, torch.ones(3, 1, dtype=torch.bool), tuple(now), 32)
    return View(torch.zeros(3, max(now), 2), visual, visual, visual.long(), None, spans, {"now": now}, (1, 1, 1))


@pytest.mark.parametrize(
    ("hyper", "kept"),
    [
        ({"tokens": 192}, [40, 27, 576]),  # int(13.5 rank)
        ({"tokens": 128}, [33, 24, 576]),  # int(9 rank + 6)
        ({"tokens": 64}, [2, 1, 576]),  # int(0.8 rank)
        ({"tokens": 128, "bias": 0}, [27, 18, 576]),
        ({"scale": 2, "bias": 1.5}, [7, 5, 576]),
        ({"scale": 2}, [6, 4, 576]),
    ],
)
def test_sparsevlm_presets_of_version_1(hyper: dict[str, Any], kept: list[int]) -> None:
    """Counts for ranks 3 and 2, and for a rank equal to the number of tokens, which prunes nothing."""
    method: Any = llava_prune.build("sparsevlm", version="1.0", **hyper)
    steps = method.decide(2, [3, 2, 576], request([576, 576, 576]))
    assert [k for k, _, _ in steps] == kept
    for k, recycle, clusters in steps:
        pruned = 576 - k
        assert recycle == (int(0.3 * pruned) + 1 if pruned else 0)
        assert clusters == (recycle // 10 + 1 if pruned else 0)


def absorbed(x: Any, keys: Any, score: Any, kept: list[int], neighbours: int) -> tuple[Any, Any]:
    """Return PruMerge's merged tokens of one image, computed patch by patch."""
    t = len(x)
    unit = keys / keys.norm(dim=1, keepdim=True)
    free = [p for p in range(t) if p not in kept]
    pool = free[len(kept) - len(set(kept)) :]  # each repeated patch removes the first of the others
    out = []
    for i, p in enumerate(kept):
        candidates = [(float(unit[p] @ unit[q]), float(score[q]), x[q]) for q in pool]
        candidates += [(float(unit[p] @ unit[q]), float(score[q]), x[q]) for j, q in enumerate(kept) if j != i]
        near = sorted(candidates, key=lambda c: -c[0])[:neighbours]
        out.append(x[p] + sum(s * v for _, s, v in near))
    return torch.stack(out), sum(score[q] * x[q] for q in pool)


@pytest.mark.parametrize("kept", [[4, 1, 6], [4, 1, 4], [2, 2, 2, 7]])
@pytest.mark.parametrize("neighbours", [1, 3, 32])
def test_prumerge_with_a_patch_named_twice(kept: list[int], neighbours: int) -> None:
    draw = torch.Generator().manual_seed(3)
    x, keys = torch.randn(9, 5, generator=draw), torch.randn(9, 4, generator=draw)
    score = torch.rand(9, generator=draw)
    tokens, rest = absorb(x[None], keys[None], score[None], torch.tensor([kept]), [len(kept)], neighbours)
    want, want_rest = absorbed(x, keys, score, kept, neighbours)
    torch.testing.assert_close(tokens[0], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rest[0], want_rest, atol=1e-5, rtol=1e-5)


def test_prumerge_plus_strict_sends_a_patch_twice() -> None:
    """Outliers that are grid points as well are sent twice with `strict`, once without."""
    score = torch.full((1, 40), 0.001)
    score[0, [4, 12, 13, 20, 37]] = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    sent = {}
    for strict in (True, False):
        method: Any = llava_prune.build("prumerge+", ratio=0.125, strict=strict)
        kept, counts = method.choose(score, 1)
        sent[strict] = kept[0, : counts[0]].tolist()
    grid = list(range(4, 39, 8))
    assert sent[True] == [4, 12, 13, 20, 37, *grid]
    assert sent[False] == [4, 12, 13, 20, 37, *(g for g in grid if g not in (4, 12, 20))]
