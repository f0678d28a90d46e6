"""Baselines of recent papers: results computed by hand, peculiarities of the official codes, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import llava_prune
from llava_prune import VisionView
from llava_prune.methods import cdpruner, dart, divprune, hired, holov, pool, scope, vispruner
from llava_prune.methods.base import in_raster_order
from llava_prune.methods.views import ImageLayout
from llava_prune.ops.selection import arranged
from llava_prune.ops.shares import proportional
from tests import models


def directions(*degrees: float) -> Tensor:
    """Return (1, n, 2) unit vectors."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)[None]


def every(n: int, batch: int = 1) -> Tensor:
    return torch.ones(batch, n, dtype=torch.bool)


# shared operations ---------------------------------------------------------------------------------------------


def test_shares_are_given_out_in_full() -> None:
    weight, total = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.0, 0.0]]), torch.tensor([[4], [7], [3]])
    room = torch.tensor([[4, 4], [4, 4], [2, 4]])
    assert proportional(weight, total, room, "weight").tolist() == [[1, 3], [3, 4], [1, 2]]
    halves = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert proportional(halves, torch.tensor([[3]]), torch.full((1, 4), 4), "fraction").tolist() == [[0, 2, 1, 0]]
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        weight, room = torch.rand(3, 9, generator=draw) ** 6, torch.randint(0, 9, (3, 9), generator=draw)
        total = (room.sum(1, keepdim=True) * torch.rand(3, 1, generator=draw)).long()
        found = proportional(weight, total, room, "weight")
        assert torch.equal(found.sum(1, keepdim=True), total) and (found >= 0).all() and (found <= room).all()


def test_tokens_in_a_given_order_take_the_places_of_those_that_remain() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    places = torch.tensor([[1, 2, 4], [2, 3, 4]])
    order = torch.tensor([[2, 0], [1, 3]])  # the second sample sends its token 1, then a new one
    new = torch.zeros(2, 1, 5)
    cut = arranged(order, [2, 2], places, visual, valid, [5, 4], new)
    assert cut.index.tolist()[0] == [0, 4, 3, 1, 5]
    assert cut.valid is not None and cut.valid.tolist()[1] == [False, True, True, True, True]
    assert cut.index.tolist()[1][1:] == [1, 3, 6, 5]
    assert in_raster_order(torch.tensor([[3, 1, 2], [5, 0, 7]]), [3, 2]).tolist() == [[1, 2, 3], [0, 5, 7]]


# DivPrune ------------------------------------------------------------------------------------------------------


def test_divprune_by_hand() -> None:
    x = directions(0, 20, 90, 200, 210)
    order, distance = divprune.max_min(x, every(5), 5)
    assert order[0].tolist() == [2, 4, 0, 1, 3]
    assert distance[0, 0].item() == pytest.approx(1 - math.cos(math.radians(70)))
    assert torch.equal(divprune.max_min(x * torch.tensor([1, 7, 0.1, 3, 2.0])[:, None], every(5), 5)[0], order)
    assert divprune.max_min(x, every(5), 3)[0].tolist() == order[:, :3].tolist()


def test_divprune_repeats_tokens_only_when_strict() -> None:
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    assert divprune.max_min(x, every(4), 3)[0].tolist() == [[0, 2, 1]]
    assert divprune.max_min(x, every(4), 3, strict=True)[0].tolist() == [[0, 2, 0]]
    zero = torch.tensor([[[0.0, 0], [1, 0], [0, 1]]])
    assert sorted(divprune.max_min(zero, every(3), 3)[0][0].tolist()) == [0, 1, 2]
    assert divprune.max_min(zero, every(3), 3, strict=True)[0][0, 1:].tolist() == [0, 0]  # a vector of NaN always wins


def test_divprune_sends_a_repeated_token_twice(tiny: Any) -> None:
    """If all patches are equal, the official code chooses the first one repeatedly."""
    given = models.inputs(tiny, [models.prompt(4, 5)], torch.zeros(1, 3, models.SIDE, models.SIDE))
    projector = tiny.model.mm_projector if models.is_llava(tiny) else tiny.model.multi_modal_projector
    hook = projector.register_forward_hook(lambda module, args, output: output[:, :1].expand_as(output).clone())
    try:
        for strict in (False, True):
            with llava_prune.pruned(tiny, "divprune", tokens=5, strict=strict, check=True) as handle:
                models.generate(tiny, given, 2)
            kept = handle.last.kept[0][0].tolist()
            assert len(kept) == 5 and len(set(kept)) == (2 if strict else 5)
            assert kept.count(-1) == (4 if strict else 0)
    finally:
        hook.remove()


def test_divprune_shares() -> None:
    assert llava_prune.build("divprune:paper").plan(576, 2) == [56, 56]
    for ratio, count in ((1 / 3, 192), (2 / 9, 128), (1 / 9, 64)):
        assert llava_prune.build("divprune", ratio=ratio).plan(576, 1) == [count]
    assert llava_prune.build("divprune").plan(20, 1) == [20]


# DART ----------------------------------------------------------------------------------------------------------


def test_dart_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pivots 7 and 12, the order of the pivots decides which tokens each of them finds."""
    monkeypatch.setattr(dart, "PIVOTS", 1)
    states = torch.cat([torch.ones(1, 5, 2), directions(0, 10, 30, 90, 180, 200, 45, 60)], 1)
    keys = torch.tensor([9.0] * 5 + [1, 2, 5, 3, 4, 2.5, 1, 6])[None, None, :, None]
    place = torch.arange(13)[None]
    visual, text = (place >= 5) & (place < 11), place >= 11
    assert dart.pivots(keys.sum((1, 3)), visual, text)[0].tolist() == [[7, 12]]
    found = dart.choose(states, keys, visual, text, [5])
    assert found[0].nonzero()[:, 0].tolist() == [5, 6, 7, 9, 10]
    strict = dart.choose(states, keys, visual, text, [5], torch.tensor([dart.set_order([7, 12])]))
    assert strict[0].nonzero()[:, 0].tolist() == [5, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("image", "text", "order"),
    [
        ([64, 63, 171, 222], [617, 618, 620, 619], [64, 617, 618, 171, 620, 619, 222, 63]),
        ([67, 35, 99, 131], [620, 621, 622, 623], [99, 35, 67, 131, 620, 621, 622, 623]),
        ([100, 200, 300, 400], [612, 615, 620, 630], [612, 100, 615, 200, 300, 620, 400, 630]),
    ],
)
def test_dart_order_of_a_set(image: list[int], text: list[int], order: list[int]) -> None:
    both = image + text
    assert [both[i] for i in dart.set_order(both)] == order


def test_dart_counts() -> None:
    assert [llava_prune.build(f"dart:official-{b}").plan(576, 32)[-1] for b in (192, 128, 64)] == [196, 132, 68]
    assert [llava_prune.build("dart", tokens=b).plan(576, 32)[-1] for b in (192, 128, 64)] == [166, 98, 30]
    assert llava_prune.build("dart:keep128").plan(576, 32) == [576] * 2 + [128] * 30
    assert llava_prune.build("dart", tokens=64).plan(576, 12) == [576] + [17] * 11
    assert llava_prune.build("dart", keep=568, strict=True).plan(576, 4) == [576, 576, 572, 572]
    with pytest.raises(ValueError, match="8 pivots cannot take 72 of 576 visual tokens each; give a keep below 576"):
        llava_prune.build("dart", keep=576, strict=True).plan(576, 4)
    with pytest.raises(ValueError, match="layer=4: this model has 4 layers; give at most 3"):
        llava_prune.build("dart", layer=4).plan(576, 4)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_dart_with_little_text(after: int, tiny: Any) -> None:
    """Little text gives fewer text pivots but as many tokens; the official code needs four text tokens."""
    given = models.inputs(tiny, [models.prompt(4, after)], models.pixels(1))
    with llava_prune.pruned(tiny, "dart", keep=13, check=True) as handle, torch.inference_mode():
        tiny(**given)
    assert handle.last.tokens_in.tolist() == [[36, 36, 13, 13, 13, 13]]
    message = f"strict=True: {after} tokens after the image; .* needs 4"
    with llava_prune.pruned(tiny, "dart", keep=13, strict=True), pytest.raises(ValueError, match=message):
        models.generate(tiny, given, 1)


def test_dart_strict_takes_one_image(tiny: Any) -> None:
    given = models.inputs(tiny, [models.prompt(4, 6, images=2)], models.pixels(2))
    message = "strict=True: 2 images in a prompt; the official code takes one"
    with llava_prune.pruned(tiny, "dart", keep=16, strict=True), pytest.raises(ValueError, match=message):
        models.generate(tiny, given, 1)


def test_dart_strict_does_not_depend_on_padding(tiny: Any) -> None:
    rows = [models.prompt(9, 5), models.prompt(4, 6, seed=1)]
    with llava_prune.pruned(tiny, "dart", keep=16, strict=True, check=True) as handle:
        models.generate(tiny, models.inputs(tiny, rows, models.pixels(2)), 1)
        batch = handle.last.kept[-1]
        for b, row in enumerate(rows):
            models.generate(tiny, models.inputs(tiny, [row], models.pixels(2)[b : b + 1]), 1)
            assert handle.last.kept[-1][0].tolist() == batch[b].tolist() and batch.shape[1] == 4 + 16


# VisPruner -----------------------------------------------------------------------------------------------------


def test_vispruner_by_hand() -> None:
    score = torch.tensor([[0.10, 0.20, 0.01, 0.15, 0.09, 0.07, 0.06, 0.05, 0.04, 0.03]])
    important, diverse = vispruner.select(directions(0, 90, 5, 180, 100, 270, 185, 300, 40, 220), score, 8, 0.5)
    assert important[0].tolist() == [1, 3, 0, 4] and diverse[0].tolist() == [5, 6, 8, 2]


def test_vispruner_removes_every_even_place_in_two_rounds() -> None:
    score, features = torch.arange(20.0, 0, -1)[None], torch.randn(1, 20, 5, generator=torch.Generator().manual_seed(0))
    important, diverse = vispruner.select(features, score, 8, 0.5)
    assert sorted(important[0].tolist() + diverse[0].tolist()) == [0, 1, 2, 3, 7, 11, 15, 19]


def test_vispruner_at_its_ends() -> None:
    draw = torch.Generator().manual_seed(1)
    features, score = torch.randn(3, 30, 6, generator=draw), torch.rand(3, 30, generator=draw)
    important, diverse = vispruner.select(features, score, 7, 1.0)
    assert important.tolist() == score.argsort(1, descending=True)[:, :7].tolist() and diverse.shape == (3, 0)
    assert vispruner.select(features, score, 7, 0.0)[1].shape == (3, 7)
    for n in range(3):  # images are independent
        alone = vispruner.select(features[n : n + 1], score[n : n + 1], 9, 0.5)
        assert [x[0].tolist() for x in alone] == [x[n].tolist() for x in vispruner.select(features, score, 9, 0.5)]


@pytest.mark.parametrize(("tokens", "fails"), [(58, "547 patches into"), (8, "remove 8 of"), (29, None), (12, None)])
def test_vispruner_numbers_that_the_official_code_refuses(tokens: int, fails: str | None) -> None:
    draw = torch.Generator().manual_seed(2)
    features, score = torch.randn(1, 576, 6, generator=draw), torch.rand(1, 576, generator=draw)
    important, diverse = vispruner.select(features, score, tokens, 0.5)
    assert len({*important[0].tolist(), *diverse[0].tolist()}) == tokens
    if fails is None:
        same = vispruner.select(features, score, tokens, 0.5, strict=True)
        assert same[1].tolist() == diverse.tolist()
    else:
        with pytest.raises(ValueError, match=f"strict=True: the official code cannot .*{fails}"):
            vispruner.select(features, score, tokens, 0.5, strict=True)


# SCOPE ---------------------------------------------------------------------------------------------------------


def test_scope_by_hand() -> None:
    x, a = torch.tensor([[[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]]]), torch.tensor([[0.35, 0.30, 0.25, 0.10]])
    assert scope.cover(x, a, 3)[0].tolist() == [1, 2, 0]
    assert scope.cover(2 * x, 5 * a, 3)[0].tolist() == [1, 2, 0]
    alike = torch.ones(1, 6, 2)
    assert scope.cover(alike, torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.1, 0.1]]), 4)[0].tolist() == [2, 0, 1, 3]
    with_zero = torch.tensor([[[0.0, 0], [1, 0], [0, 1]]])
    assert scope.cover(with_zero, torch.ones(1, 3), 3)[0].tolist() == [1, 2, 0]


def test_scope_strict_shares_the_budget_over_crops() -> None:
    draw = torch.Generator().manual_seed(0)
    attention = {0: torch.rand(3, 2, 1, 577, generator=draw)}
    shown = VisionView(torch.randn(3, 576, 4, generator=draw), attention, {}, (24, 24), crops=5)
    shown.find_layout = lambda: [ImageLayout(3, 1, 2)]
    for strict, count in ((False, 128), (True, 213)):
        cut = llava_prune.build("scope", tokens=640, strict=strict).prune_vision(shown)
        assert cut is not None and cut.live.sum(1).tolist() == [count] * 3
    shown.find_layout = None
    with pytest.raises(ValueError, match="strict=True: 3 images at once"):
        llava_prune.build("scope", tokens=640, strict=True).prune_vision(shown)


# CDPruner ------------------------------------------------------------------------------------------------------

G = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0.6, 0.8]]])


def test_cdpruner_by_hand() -> None:
    e, t = torch.tensor([[[0.0, 1], [1, 0], [0.6, 0.8], [0.8, 0.6]]]), torch.tensor([[1.0, 0]])
    relevance = cdpruner.clip_relevance(e, t)
    assert relevance[0].tolist() == pytest.approx([1.000001, 1e-6, 0.400001, 0.200001], abs=1e-7)
    order, gain = cdpruner.greedy(cdpruner.clip_kernel(G, relevance), every(4), 2)
    assert order[0].tolist() == [0, 2] and gain[0].tolist() == pytest.approx([1.000002, 0.160001], abs=1e-6)
    for weight, want in ((0.5, [0, 2]), (1.0, [0, 3])):
        method: Any = llava_prune.build("cdpruner", tokens=2, weight=weight)
        assert method.order(G, t, every(4), [2])[0].tolist() == want
        assert method.order(2 * G, t, every(4), [2])[0].tolist() == want


def test_cdpruner_fills_up_beyond_the_rank() -> None:
    """Of four tokens in two dimensions, two are independent."""
    t = torch.tensor([[1.0, 0]])
    found = llava_prune.build("cdpruner", tokens=4).order(G, t, every(4), [4])  # type: ignore[attr-defined]
    assert found[0, :2].tolist() == [0, 2] and sorted(found[0].tolist()) == [0, 1, 2, 3]
    flat = torch.randn(1, 200, 6, generator=torch.Generator().manual_seed(0))
    kernel = cdpruner.clip_kernel(flat, torch.rand(1, 200, generator=torch.Generator().manual_seed(1)))
    order, gain = cdpruner.greedy(kernel, every(200), 100)
    assert len(set(order[0].tolist())) == 100 and (gain[0, :6] > 1e-6 * gain[0, 0]).all()
    official, _ = cdpruner.greedy(kernel, every(200), 100, strict=True)
    assert official[0, :6].tolist() == order[0, :6].tolist()
    assert len(set(official[0].tolist())) < 100, "the official code keeps fewer"
    with pytest.raises(ValueError, match=r"strict=True: after \d+ tokens the others are combinations"):
        cdpruner.refuse_repeats(official)


def test_cdpruner_without_a_difference_in_relevance() -> None:
    same = torch.ones(1, 4, 3)
    assert cdpruner.clip_relevance(same, torch.ones(1, 3)).tolist() == [[1.0] * 4]
    assert not cdpruner.clip_relevance(same, torch.ones(1, 3), strict=True).isfinite().all()
    assert cdpruner.embedding_relevance(G, torch.zeros(1, 2), every(4)).tolist() == [[1.0] * 4]


# HoloV ---------------------------------------------------------------------------------------------------------


def test_holov_by_hand() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]] * 2)[None]
    a = torch.tensor([[0.10, 0.20, 0.05, 0.05, 0.30, 0.10, 0.15, 0.05]])
    for count, want in ((4, [1, 4, 6, 5]), (6, [1, 0, 4, 5, 6, 7])):
        for strict in (False, True):
            order, total = holov.select(x, a, every(8), [count], [2], strict=strict)
            assert order[0, :count].tolist() == want and total.item() == count
            assert holov.select(5 * x, 3 * a, every(8), [count], [2], strict=strict)[0].tolist() == order.tolist()
    order, total = holov.select(x, a, every(8), [7], [2], strict=True)
    assert total.item() == 6 and order[0, :6].tolist() == [1, 0, 4, 5, 6, 7]
    order, total = holov.select(x, a, every(8), [7], [2])
    assert total.item() == 7 and sorted(order[0, :7].tolist()) == [0, 1, 2, 4, 5, 6, 7]


def test_holov_regions() -> None:
    region = holov.strips(every(576), [5])[0]
    assert region.bincount().tolist() == [116, 115, 115, 115, 115] and torch.equal(region, region.sort().values)
    method: Any = llava_prune.build("holov")
    assert [method.strips(576, t) for t in (64, 128, 192, 2000)] == [16, 8, 5, 1]
    assert [method.strips(2880, t) for t in (160, 320, 640)] == [32, 16, 8]


def test_holov_tokens_of_zeros_are_sent(tiny: Any) -> None:
    """If one region has nearly all of the attention, the official code fills up with tokens of zeros."""
    given = models.inputs(tiny, [models.prompt(4, 5)], models.pixels(1))
    with llava_prune.pruned(tiny, "holov", tokens=30, regions=12, strict=True, check=True) as handle:
        out = models.generate(tiny, given, 2)
        assert handle.last.tokens_in.tolist() == [[30] * models.LAYERS]
        missing = handle.last.kept[0][0].tolist().count(-1)
    assert missing > 0 and all(step.isfinite().all() for step in out.logits)
    with llava_prune.pruned(tiny, "holov", tokens=30, regions=12, check=True) as handle:
        models.generate(tiny, given, 2)
        assert -1 not in handle.last.kept[0][0].tolist()


# HiRED ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "strict", "counts"),
    [
        (10, True, [4, 0, 3, 3, 0]),
        (10, False, [4, 0, 3, 3, 0]),
        (5, True, [2, 0, 1, 1, 0]),
        (5, False, [2, 0, 2, 1, 0]),
    ],
)
def test_hired_by_hand(budget: int, strict: bool, counts: list[int]) -> None:
    last, first = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 5), torch.tensor([0.1, 0.4, 0.3, 0.2])
    live = hired.select(first, last, budget, 0.5, [0, 1, 2, 3], strict)
    assert live.sum(1).tolist() == counts
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in live)


def test_hired_tiles() -> None:
    """Strips in raster order when strict; otherwise the areas of the tiles, without their padding."""
    assert hired.tile_of_patch(ImageLayout(5, 2, 2), (4, 4), strict=True) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert hired.tile_of_patch(ImageLayout(5, 2, 2), (4, 4)) == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    assert hired.tile_of_patch(ImageLayout(3, 1, 2), (4, 4)) == [0, 0, 1, 1] * 4
    # an image of 900 x 300 in 2 x 2 tiles takes the middle third of the height
    found = hired.tile_of_patch(ImageLayout(5, 2, 2, (900, 300)), (4, 4))
    assert found == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    # in 1 x 4 tiles it takes three quarters of the width, half of the first and the last tile
    assert hired.tile_of_patch(ImageLayout(5, 1, 4, (900, 300)), (1, 8)) == [0, 1, 1, 1, 2, 2, 2, 3]
    assert hired.tile_of_patch(ImageLayout(4, 3, 1, (300, 300)), (6, 1)) == [1] * 6


def test_hired_without_counted_patches() -> None:
    last, first = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)), torch.rand(16)
    live = hired.select(first, last, 40, 1.0, [0] * 16)
    assert live.sum(1).tolist() == [16, 6, 6, 6, 6]
    with pytest.raises(ValueError, match="strict=True: the official code divides by zero at alpha=1"):
        hired.select(first, last, 40, 1.0, [0] * 16, strict=True)


def test_hired_counts() -> None:
    assert llava_prune.build("hired:paper-20").plan(576, 1) == [115]
    assert [llava_prune.build("hired", rate=t / 576).plan(576, 1) for t in (13, 64, 192)] == [[13], [64], [192]]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["llava", "next"])
def test_hired_on_crops_of_a_model(family: str, strict: bool, tiny_models: Any) -> None:
    """The image keeps the budget of three crops less what unpadding removes, plus newline tokens unless strict."""
    model = tiny_models["next"] if family == "next" else models.tiny_llava(anyres=True)
    size = (2 * models.SIDE, models.SIDE)
    given = models.inputs(model, [models.prompt(5, 9)], [models.crops(size)], [size])
    with llava_prune.pruned(model, "hired", tokens=50, strict=strict, check=True) as handle, torch.inference_mode():
        model(**given)
    kept = handle.last.tokens_in[0, 0].item()
    assert 27 <= kept <= 30 if strict else kept == 30 + models.GRID


# baselines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "want"),
    [(64, (8, 8)), (128, (8, 16)), (192, (12, 16)), (1, (1, 1)), (2, (1, 2)), (97, (8, 12)), (575, (24, 23))],
)
def test_pool_rectangles(tokens: int, want: tuple[int, int]) -> None:
    found = pool.rectangle(tokens, (24, 24))
    assert sorted(found) == sorted(want)
    assert llava_prune.build("pool", tokens=tokens).plan(576, 1) == [found[0] * found[1]]


def test_pool_averages() -> None:
    x = torch.arange(16.0).view(1, 16, 1)
    cut = llava_prune.build("pool", tokens=4).prune_vision(VisionView(x, {}, {}, (4, 4)))
    assert cut is not None and cut.ids is not None
    assert cut.features[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5] and cut.ids.unique().tolist() == [-1]
    assert cut.groups is not None and cut.groups().tolist() == [[0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2]


def test_text_only_is_the_prompt_without_its_image(tiny: Any, logits: Any) -> None:
    row = models.prompt(5, 7)
    text = models.inputs(tiny, [[i for i in row if i != models.IMAGE]])
    base = logits(tiny, text)
    with llava_prune.pruned(tiny, "text-only") as handle:
        found = logits(tiny, models.inputs(tiny, [row], models.pixels(1)))
    assert handle.last.tokens_in.tolist() == [[0] * models.LAYERS]
    assert torch.allclose(found, base, atol=1e-5)


# refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("divprune", {"tokens": 3, "ratio": 0.1}, "tokens=3 and ratio=0.1 both fix"),
        ("divprune", {"ratio": 2}, r"ratio=2: must be a finite number in \[0, 1\]"),
        ("divprune", {"order": "score"}, "order='score': must be 'raster' or 'selection'"),
        ("dart", {"tokens": 3, "keep": 9}, "tokens=3 and keep=9 both fix"),
        ("dart", {"layer": 0}, "layer=0: must be a positive integer"),
        ("vispruner", {"ratio": 1.5}, "ratio=1.5: must be"),
        ("scope", {"alpha": -1}, "alpha=-1: must be"),
        ("scope", {"combine": "max"}, "combine='max': must be 'multiply' or 'add'"),
        ("cdpruner", {"weight": 2}, "weight=2: must be"),
        ("cdpruner", {"sign": 0}, "sign=0: must be 1 or -1"),
        ("holov", {"regions": 0}, "regions=0: must be a positive integer"),
        ("hired", {"tokens": 3, "rate": 0.1}, "tokens=3 and rate=0.1 both fix"),
        ("hired", {"alpha": 2}, "alpha=2: must be"),
        ("pool", {"tokens": 0}, "tokens=0: must be a positive integer"),
        ("text-only", {"tokens": 3}, "no hyper-parameter tokens"),
    ],
)
def test_refused_values(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava_prune.build(name, **hyper)


# CLIP's text tower ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP with the vision width of the small models, and a tokenizer of single words."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "what", "is", "red", "left", "<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 6), ("</s>", 7)])
    folder = tmp_path_factory.mktemp("clip")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids = {"vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7, "pad_token_id": 0}
    config = CLIPConfig(text_config={**sizes, **ids}, vision_config={**sizes, "image_size": 28}, projection_dim=16)
    model = CLIPModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 8**-0.5)
    model.save_pretrained(folder)
    return str(folder)


def test_cdpruner_with_clip_by_hand(clip_folder: str, tiny: Any) -> None:
    """The relevance of two images to their questions equals that from the parts of CLIP, called one by one."""
    from transformers import CLIPModel

    texts, pixels = ["what is red", "is that left"], models.pixels(2)
    rows = [models.prompt(4, 6), models.prompt(5, 8, seed=1)]
    seen: dict[str, Tensor] = {}
    projector = tiny.model.mm_projector if models.is_llava(tiny) else tiny.model.multi_modal_projector
    hook = projector.register_forward_hook(
        lambda module, args, output: seen.update(
            features=args[0][:, : models.PATCHES], tokens=output[:, : models.PATCHES]
        )
    )
    try:
        for sign in (-1, 1):
            hyper = {"tokens": 12, "clip": clip_folder, "sign": sign}
            with llava_prune.pruned(tiny, "cdpruner", check=True, **hyper) as handle, llava_prune.questions(texts):
                models.generate(tiny, models.inputs(tiny, rows, pixels), 2)
                models.generate(tiny, models.inputs(tiny, rows, pixels), 2, num_beams=2)
            clip = CLIPModel.from_pretrained(clip_folder)
            ids = torch.tensor([[6, 1, 2, 3, 7], [6, 2, 5, 4, 7]])
            with torch.no_grad():
                vision = getattr(clip.vision_model, "vision_model", clip.vision_model)
                e = clip.visual_projection(vision.post_layernorm(seen["features"]))
                t = clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state[:, -1])
            each = e.shape[0] // 2  # releases that encode images after expanding the beams encode each image twice
            for n in range(2):
                image = slice(n * each, n * each + 1)
                relevance = cdpruner.clip_relevance(e[image], t[n : n + 1], sign)
                kernel = cdpruner.clip_kernel(seen["tokens"][image], relevance)
                order, _ = cdpruner.greedy(kernel, every(models.PATCHES), 12)
                kept = handle.last.kept[0]
                assert kept[n * kept.shape[0] // 2].tolist() == sorted(order[0].tolist())
    finally:
        hook.remove()


def test_cdpruner_reads_long_questions_in_segments(clip_folder: str) -> None:
    from llava_prune.models.text_tower import text_tower

    tower = text_tower(clip_folder, torch.device("cpu"))
    long = "what is red " * 40
    ours, official = tower.text(long), tower.text(long, strict=True)
    assert ours.shape == official.shape == (2, 16)
    assert not torch.allclose(ours[0], official[0]) and torch.equal(ours[1], official[1])
    assert torch.equal(tower.text("is red"), tower.text("is red", strict=True))


@pytest.mark.parametrize("family", ["llava", "next"])
def test_cdpruner_with_clip_on_crops(family: str, clip_folder: str, tiny_models: Any) -> None:
    model = tiny_models["next"] if family == "next" else models.tiny_llava(anyres=True)
    size = (2 * models.SIDE, models.SIDE)
    given = models.inputs(model, [models.prompt(5, 9)], [models.crops(size)], [size])
    with llava_prune.questions(["what"]), llava_prune.pruned(model, "cdpruner", tokens=40, clip=clip_folder) as handle:
        models.generate(model, given, 2)
    assert handle.last.tokens_in.tolist() == [[40] * models.LAYERS]


def test_cdpruner_refusals_with_clip(clip_folder: str, tiny: Any, tmp_path: Any) -> None:
    given = models.inputs(tiny, [models.prompt(4, 6)], models.pixels(1))
    with pytest.raises(ValueError, match="is not a folder with a CLIP and its text tower .*leave clip out"):
        llava_prune.attach(tiny, "cdpruner", tokens=12, clip=str(tmp_path))
    with llava_prune.pruned(tiny, "cdpruner", tokens=12, clip=clip_folder):
        with pytest.raises(ValueError, match=r"compares patches with the question; wrap the call in llava_prune.quest"):
            models.generate(tiny, given, 1)
        with pytest.raises(ValueError, match="2 questions for 1 images"), llava_prune.questions(["a", "what"]):
            models.generate(tiny, given, 1)
        with pytest.raises(ValueError, match="must be a list of strings"), llava_prune.questions("what"):
            pass
    for hyper in ({"weight": 1.0}, {"halves": True}):
        with pytest.raises(ValueError, match="belong to the embedding form"):
            llava_prune.build("cdpruner", clip=clip_folder, **hyper)
    with pytest.raises(ValueError, match="clip=3: must be the folder"):
        llava_prune.build("cdpruner", clip=3)


# resize --------------------------------------------------------------------------------------------------------


def test_resize_is_the_tower_on_a_smaller_image(tiny: Any) -> None:
    """The features equal those of transformers' own interpolation of position embeddings."""
    pixels = models.pixels(2)
    rows = [models.prompt(4, 6), models.prompt(5, 8, seed=1)]
    seen: list[Tensor] = []
    projector = tiny.model.mm_projector if models.is_llava(tiny) else tiny.model.multi_modal_projector
    with llava_prune.pruned(tiny, "resize", tokens=12, check=True) as handle:
        hook = projector.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        try:
            models.generate(tiny, models.inputs(tiny, rows, pixels), 2)
        finally:
            hook.remove()
    assert handle.last.tokens_in.tolist() == [[12] * models.LAYERS] * 2
    tower = tiny.get_vision_tower().vision_tower if models.is_llava(tiny) else tiny.model.vision_tower
    small = torch.nn.functional.interpolate(pixels, (3 * 14, 4 * 14), mode="bicubic", antialias=True)
    with torch.no_grad():
        out = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][:, 1:]
    assert torch.allclose(seen[0][:, models.PATCHES :], out, atol=1e-5)
    assert seen[0].shape[1] == models.PATCHES + 12, "the package has the features of the full image"
