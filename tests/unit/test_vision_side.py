"""Hand checks of FasterVLM, VisionZip, PruMerge and ToMe, worked out on paper, and of compositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llava_prune
from llava_prune import VisionView
from llava_prune.core.select import absorb, fold_tokens, match
from llava_prune.methods.prumerge import outliers
from llava_prune.methods.tome import even_schedule
from llava_prune.methods.visionzip import contextual_tokens
from tests import models


def view(score: list[float], features: Tensor, keys: Tensor, cls: Tensor | None = None, crops: int = 1) -> VisionView:
    """One picture, one head; `score` is the class token's row, `keys` (1 + T, d) include the class token's."""
    probs = torch.tensor([0.0, *score])[None, None, None]
    t = len(score)
    return VisionView(features[None], {0: probs}, {0: keys[None, None]}, None, (1, t), cls=cls, crops=crops)


def test_fastervlm_keeps_raster_order() -> None:
    x = torch.arange(8.0).view(4, 2)
    for score in ([0.1, 0.4, 0.2, 0.3], [0.1, 0.3, 0.2, 0.4]):
        cut = llava_prune.build("fastervlm", tokens=2).reduce(view(score, x, torch.zeros(5, 2)))
        assert cut is not None and cut.ids is not None
        assert cut.ids[cut.live].tolist() == [1, 3]
    assert llava_prune.build("fastervlm", tokens=4).reduce(view(score, x, torch.zeros(5, 2))) is None


@pytest.mark.parametrize("crops, total", [(5, 145), (3, 87)])
def test_fastervlm_on_crops(crops: int, total: int) -> None:
    """29 a crop where a picture has up to 5."""
    probs = torch.rand(crops, 2, 1, 577, generator=torch.Generator().manual_seed(0))
    shown = VisionView(torch.zeros(crops, 576, 2), {0: probs}, {}, None, (24, 24), crops=5)
    cut = llava_prune.build("fastervlm", tokens=145).reduce(shown)
    assert cut is not None and int(cut.live.sum()) == total


TOY = torch.tensor([[10.0, 10], *([i, 0.0] for i in range(1, 9))])
TOY_KEYS = torch.tensor([[1, 1], [1, 0], [9, 9], [1, 0.1], [0, 1], [9, 9], [0.1, 1], [1, 0], [0, 1]])


def test_visionzip_toy() -> None:
    method = llava_prune.build("visionzip", dominant=3, contextual=2)
    for keys in (TOY_KEYS, 7 * TOY_KEYS):  # the length of all keys does not matter
        cut = method.reduce(view([0.1, 0.9, 0.2, 0.3, 0.8, 0.1, 0.1, 0.1], TOY[1:], keys, TOY[:1]))
        assert cut is not None and cut.ids is not None and bool(cut.live.all())
        assert cut.ids.tolist() == [[-1, 1, 4, -1, -1]]
        assert cut.features.tolist() == [[[10, 10], [2, 0], [5, 0], [6, 0], [12, 0]]]


@pytest.mark.parametrize("tokens, split", [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5))])
def test_visionzip_budgets(tokens: int, split: tuple[int, int]) -> None:
    method: Any = llava_prune.build(f"visionzip:{tokens}")
    assert method.split() == split and method.plan(576, 4) == [tokens] * 4


def test_visionzip_equal_keys_go_to_the_first_target() -> None:
    x = torch.randn(1, 576, 4, generator=torch.Generator().manual_seed(0))
    rest = torch.arange(53, 576)[None]  # 54 dominant with the class token
    rows, targets, label = contextual_tokens(x, torch.ones(1, 576, 3), rest, 10)
    assert targets.tolist() == [[53 + 52 * i for i in range(10)]]
    assert label[0].bincount(minlength=10).tolist() == [514] + [1] * 9
    assert torch.equal(rows[:, 1:], x[:, targets[0, 1:]])


def test_prumerge_fence_is_strict() -> None:
    assert outliers(torch.tensor([[*range(1, 10), 30.0]])) == [1]
    assert outliers(torch.tensor([[0.001] * 546 + [0.01] * 30, [0.5] * 576])) == [30, 0]


def test_prumerge_five_patches() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [2, 2], [4, 0], [0, 4]])[None]
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0.1], [0.1, 1]])[None]
    a = torch.tensor([[0.4, 0.1, 0.3, 0.05, 0.15]])
    rows, rest = absorb(x, keys, a, torch.tensor([[0, 2]]), [2], neighbours=2)
    torch.testing.assert_close(rows, torch.tensor([[[1.8, 0.6], [2.2, 2.6]]]))
    torch.testing.assert_close(rest, torch.tensor([[0.2, 0.7]]))


@pytest.mark.parametrize("k, grid", [(40, 144), (32, 96), (16, 48), (36, 115)])
def test_prumerge_plus_grid(k: int, grid: int) -> None:
    score = torch.full((1, 576), 0.001)
    score[0, :k] = 0.01 + torch.arange(k) * 1e-4
    method: Any = llava_prune.build("prumerge+")
    kept, counts = method.choose(score, 1)
    step = 576 // k // 3
    ids = kept[0].tolist()
    assert ids[:k] == list(range(k - 1, -1, -1))
    assert ids[k:] == [i for i in range(0, 575, step) if i >= k] and len(range(0, 575, step)) == grid
    assert counts == [len(ids)]


@pytest.mark.parametrize("tokens, sent", [(192, 193), (128, 129), (64, 65), (144, 145)])
def test_prumerge_budgets(tokens: int, sent: int) -> None:
    for name in ("prumerge", "prumerge+"):
        assert llava_prune.build(name, tokens=tokens, strict=True).plan(576, 2) == [sent] * 2
    assert llava_prune.build("prumerge", tokens=tokens, exact=True).plan(576, 2) == [tokens] * 2


def test_full_width_logits_are_sums_over_heads() -> None:
    q, k = (torch.randn(1024, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    heads = (q.view(16, 64) * k.view(16, 64)).sum(1) / 8
    assert float(q @ k / 32) == pytest.approx(float(4 * heads.mean()), abs=1e-12)


def angles(*degrees: float) -> Tensor:
    a = torch.deg2rad(torch.tensor([0.0, *degrees]))
    return torch.stack([a.cos(), a.sin()], 1)[None]


def test_tome_two_blocks_by_hand() -> None:
    x, size, groups = torch.arange(7.0)[None, :, None], torch.ones(1, 7), torch.arange(7)[None]
    x, size, groups = fold_tokens(match(angles(0, 10, 90, 95, 180, 60), 2), x, size, groups)
    assert x.flatten().tolist() == [0, 6, 1.5, 3.5, 5] and size.tolist() == [[1, 1, 2, 2, 1]]
    x, size, groups = fold_tokens(match(angles(60, 5, 92, 180), 1), x, size, groups)
    assert x.flatten().tolist() == [0, 5, 3.0, 3.5] and size.tolist() == [[1, 1, 3, 2]]
    assert groups.tolist() == [[0, 2, 2, 3, 3, 1, 2]]
    assert match(angles(0, 10, 90, 95, 180, 60), 99).stay.shape == (1, 4)


def test_tome_schedules() -> None:
    assert even_schedule(384, 23, 577) == [17] * 16 + [16] * 7
    assert even_schedule(448, 23, 577) == [20] * 11 + [19] * 12
    assert even_schedule(512, 23, 577) == [23] * 6 + [22] * 17
    assert even_schedule(512, 4, 577) == [160, 160, 128, 64]  # a shallow tower: halving binds at the end
    with pytest.raises(ValueError, match="leave 144 of 576"):
        even_schedule(512, 2, 577)


# compositions ---------------------------------------------------------------------------------------------------


def test_names_of_compositions() -> None:
    for name, parts in (
        ("visionzip+autoprune", ("visionzip", "autoprune")),
        ("prumerge++fastv", ("prumerge+", "fastv")),
        ("prumerge+fastv", ("prumerge", "fastv")),
    ):
        method: Any = llava_prune.build(name, tokens=64)
        assert (method.vision.name, method.language.name) == parts
        assert (method.vision.tokens, method.language.tokens, method.tokens) == (160, 64, 64)
    exact: Any = llava_prune.build("visionzip+autoprune", tokens=64, dominant=54, contextual=10, lam=0.5)
    assert (exact.vision.split(), exact.language.lam) == ((54, 10), 0.5)
    for wrong in ("autoprune+visionzip", "visionzip+fastervlm", "nobody+autoprune"):
        with pytest.raises(ValueError, match="put such a method|unknown method"):
            llava_prune.build(wrong)


@pytest.mark.parametrize("name", ["visionzip+autoprune", "prumerge+autoprune", "tome+fastv", "fastervlm+pdrop"])
def test_compositions_prune_twice(name: str, tiny: Any) -> None:
    given = models.inputs(tiny, [models.prompt(5, 7), models.prompt(4, 9, seed=1)], models.pictures(2))
    with llava_prune.pruned(tiny, name, tokens=12, vision_tokens=20, check=True) as handle:
        out = models.generate(tiny, given, 3)
    first = 21 if name.startswith("prumerge") else 20
    assert handle.last.tokens_in[:, 0].tolist() == [first, first]
    assert (handle.last.tokens_out[:, -1] < first).all()
    assert all(step.isfinite().all() for step in out.logits)


def test_a_changed_tower_cannot_be_read(tiny: Any) -> None:
    with pytest.raises(ValueError, match="changes the tower"):
        llava_prune.attach(tiny, "tome+autoprune", tokens=12, vision_tokens=20)
    with pytest.raises(ValueError, match="leave"):
        llava_prune.attach(tiny, "tome", tokens=3)


# one tower pass a picture ---------------------------------------------------------------------------------------


def test_remembered_pictures_answer_alike(tiny: Any) -> None:
    """Methods that leave the tower alone share a pass; a tower that merges has its own."""
    loaded = models.loaded(tiny)
    rows, pixels = [models.prompt(5, 7), models.prompt(4, 9, seed=1)], models.pictures(2)
    names = ["full", "visionzip", "prumerge", "tome", "fastervlm"]
    methods = [llava_prune.build(n, **({} if n == "full" else {"tokens": 12})) for n in names]
    alone = []
    for method in methods:
        with llava_prune.pruned(tiny, method):
            alone.append(loaded.generate(rows, pixels, max_new_tokens=4))
    with loaded.remember_images(methods) as memo:
        for _ in range(2):
            for method, want in zip(methods, alone, strict=True):
                with llava_prune.pruned(tiny, method):
                    got = loaded.generate(rows, pixels, keys=["a", "b"], max_new_tokens=4)
                assert torch.equal(got, want), method.name
        assert memo.passes == 4
        assert memo.holds("a") and memo.holds("a", methods[3])
        assert not memo.holds("a", llava_prune.build("tome", tokens=15))
