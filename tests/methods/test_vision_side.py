"""FasterVLM, VisionZip, PruMerge and ToMe against results computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llava_prune
from llava_prune import VisionView
from llava_prune.bench.flops import Size, flops_visual_only, percent_visual_only
from llava_prune.methods.prumerge import absorb, outliers
from llava_prune.methods.tome import even_schedule, match
from llava_prune.methods.visionzip import contextual_tokens
from llava_prune.ops.merging import merge_tokens
from llava_prune.runtime.merging import Merging, merging_block
from tests import models


def view(score: list[float], features: Tensor, keys: Tensor, cls: Tensor | None = None, crops: int = 1) -> VisionView:
    """Return a view of one image; `score` is the class token's row, `keys` (1 + T, d) include the class token's."""
    probs = torch.tensor([0.0, *score])[None, None, None]
    t = len(score)
    return VisionView(features[None], {0: probs}, {0: keys[None, None]}, (1, t), cls=cls, crops=crops)


def test_fastervlm_keeps_raster_order() -> None:
    x = torch.arange(8.0).view(4, 2)
    for score in ([0.1, 0.4, 0.2, 0.3], [0.1, 0.3, 0.2, 0.4]):
        cut = llava_prune.build("fastervlm", tokens=2).prune_vision(view(score, x, torch.zeros(5, 2)))
        assert cut is not None and cut.ids is not None
        assert cut.ids[cut.live].tolist() == [1, 3]
    assert llava_prune.build("fastervlm", tokens=4).prune_vision(view(score, x, torch.zeros(5, 2))) is None


@pytest.mark.parametrize("crops, total", [(5, 145), (3, 87)])
def test_fastervlm_on_crops(crops: int, total: int) -> None:
    """A budget of 145 gives each crop 29 tokens where an image has up to 5 crops."""
    probs = torch.rand(crops, 2, 1, 577, generator=torch.Generator().manual_seed(0))
    shown = VisionView(torch.zeros(crops, 576, 2), {0: probs}, {}, (24, 24), crops=5)
    cut = llava_prune.build("fastervlm", tokens=145).prune_vision(shown)
    assert cut is not None and int(cut.live.sum()) == total


@pytest.mark.parametrize(
    ("tokens", "trillions", "percent"),
    [(576, 3.817, 100), (288, 1.887, 49.4), (192, 1.253, 32.8), (144, 0.938, None), (128, 0.833, 21.8)]
    + [(64, 0.416, 10.9), (58, 0.376, None)],
)
def test_fastervlm_flops(tokens: int, trillions: float, percent: float | None) -> None:
    """FLOPs of a 7B prefill on visual tokens alone."""
    counts = llava_prune.build("fastervlm", tokens=tokens).plan(576, 32)
    assert counts is not None
    assert flops_visual_only(counts, Size()) / 1e12 == pytest.approx(trillions, abs=6e-4)
    if percent is not None:
        assert percent_visual_only(counts, Size()) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("family", ["llava", "hf"])
def test_class_token_row_is_the_towers_own(family: str) -> None:
    """The recorded row equals that of the tower's eager attention; with the class token's own column it sums to 1."""
    model = models.tiny_llava() if family == "llava" else models.tiny_hf()
    seen: dict[str, Any] = {}

    class Look(llava_prune.Method):
        def vision_queries(self, feature_layer: int) -> dict[int, list[int]]:
            seen["block"] = feature_layer
            return {feature_layer: [0]}

        def prune_vision(self, view: VisionView) -> None:
            (rows,) = view.attention.values()
            seen.update(rows=rows, score=view.class_attention())

    given = models.inputs(model, [models.prompt(5, 7)] * 2, models.pixels(2))
    (attention,) = (m for n, m in model.named_modules() if n.endswith("encoder.layers.2.self_attn"))
    attention.config._attn_implementation = "eager"
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(whole=output[1]))
    try:
        with torch.inference_mode(), llava_prune.pruned(model, Look()):
            model(**given)
    finally:
        hook.remove()
    assert seen["block"] == 2 and seen["rows"].shape == (2, 4, 1, 37)
    torch.testing.assert_close(seen["rows"][:, :, 0], seen["whole"][:, :, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen["score"].sum(1) + seen["rows"][:, :, 0, 0].mean(1), torch.ones(2))


TOY = torch.tensor([[10.0, 10], *([i, 0.0] for i in range(1, 9))])
TOY_KEYS = torch.tensor([[1, 1], [1, 0], [9, 9], [1, 0.1], [0, 1], [9, 9], [0.1, 1], [1, 0], [0, 1]])


def test_visionzip_toy() -> None:
    method = llava_prune.build("visionzip", dominant=3, contextual=2)
    for keys in (TOY_KEYS, 7 * TOY_KEYS):  # the length of all keys does not matter
        cut = method.prune_vision(view([0.1, 0.9, 0.2, 0.3, 0.8, 0.1, 0.1, 0.1], TOY[1:], keys, TOY[:1]))
        assert cut is not None and cut.ids is not None and bool(cut.live.all())
        assert cut.ids.tolist() == [[-1, 1, 4, -1, -1]]
        assert cut.features.tolist() == [[[10, 10], [2, 0], [5, 0], [6, 0], [12, 0]]]


@pytest.mark.parametrize("tokens, split", [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5))])
def test_visionzip_budgets(tokens: int, split: tuple[int, int]) -> None:
    method: Any = llava_prune.build(f"visionzip:{tokens}")
    assert method.split() == split and method.plan(576, 4) == [tokens] * 4


def test_visionzip_counts_and_order() -> None:
    """54 + 10: the class token, 53 patches, and 523 others of which 513 are merged; both blocks in raster order."""
    draw = torch.Generator().manual_seed(0)
    x, keys = torch.randn(576, 4, generator=draw), torch.randn(577, 8, generator=draw)
    score = torch.rand(576, generator=draw)
    cut = llava_prune.build("visionzip", dominant=54, contextual=10).prune_vision(view(score.tolist(), x, keys, x[:1]))
    assert cut is not None and cut.ids is not None
    ids = cut.ids[0].tolist()
    assert len(ids) == 64 and ids[0] == -1 and ids[54:] == [-1] * 10
    dominant = ids[1:54]
    assert dominant == sorted(score.topk(53).indices.tolist())
    rest = torch.tensor([[i for i in range(576) if i not in dominant]])
    rows, targets, label = contextual_tokens(x[None], keys[None, 1:], rest, 10)
    assert rest.shape[1] == 523 and targets[0].tolist() == rest[0, [52 * i for i in range(10)]].tolist()
    assert int((label[0].bincount(minlength=10) - 1).sum()) == 513
    torch.testing.assert_close(cut.features[0, 54:], rows[0])


def test_visionzip_equal_keys_go_to_the_first_target() -> None:
    x = torch.randn(1, 576, 4, generator=torch.Generator().manual_seed(0))
    rest = torch.arange(53, 576)[None]  # 54 dominant with the class token
    rows, targets, label = contextual_tokens(x, torch.ones(1, 576, 3), rest, 10)
    assert targets.tolist() == [[53 + 52 * i for i in range(10)]]
    assert label[0].bincount(minlength=10).tolist() == [514] + [1] * 9
    assert torch.equal(rows[:, 1:], x[:, targets[0, 1:]])


def test_prumerge_fence_is_strict() -> None:
    assert outliers(torch.tensor([[*range(1, 10), 30.0]])).tolist() == [1]
    assert outliers(torch.tensor([[0.001] * 546 + [0.01] * 30, [0.5] * 576])).tolist() == [30, 0]


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
    x, size, groups = merge_tokens(match(angles(0, 10, 90, 95, 180, 60), 2), x, size, groups)
    assert x.flatten().tolist() == [0, 6, 1.5, 3.5, 5] and size.tolist() == [[1, 1, 2, 2, 1]]
    x, size, groups = merge_tokens(match(angles(60, 5, 92, 180), 1), x, size, groups)
    assert x.flatten().tolist() == [0, 5, 3.0, 3.5] and size.tolist() == [[1, 1, 3, 2]]
    assert groups.tolist() == [[0, 2, 2, 3, 3, 1, 2]]
    assert match(angles(0, 10, 90, 95, 180, 60), 99).kept.shape == (1, 4)
    assert match(torch.ones(1, 577, 2), 577).merged.shape == (1, 288)


def test_tome_schedules() -> None:
    assert even_schedule(384, 23, 577) == [17] * 16 + [16] * 7
    assert even_schedule(448, 23, 577) == [20] * 11 + [19] * 12
    assert even_schedule(512, 23, 577) == [23] * 6 + [22] * 17
    assert even_schedule(512, 4, 577) == [160, 160, 128, 64]  # a shallow tower: halving binds at the end
    with pytest.raises(ValueError, match="leave 144 of 576"):
        even_schedule(512, 2, 577)
    constant = llava_prune.build("tome:constant-16").merge_schedule(22, 576)
    assert len(constant) == 24 and 576 - sum(constant[:23]) == 208
    assert sum(llava_prune.build("tome", schedule=[17] * 16 + [16] * 7 + [0]).merge_schedule(22, 576)) == 384


def test_tome_attends_to_a_token_by_its_size() -> None:
    """Equal keys of one and of three patches have weights 1/4 and 3/4, and 1/2 without proportional attention."""
    model = models.tower()
    layer = next(m for n, m in model.named_modules() if n.endswith("encoder.layers.0"))
    attn, width = layer.self_attn, models.WIDTH
    with torch.no_grad():
        for p in attn.parameters():
            p.zero_()
        attn.v_proj.weight.copy_(torch.eye(width))
        attn.out_proj.weight.copy_(torch.eye(width))
        for p in layer.mlp.parameters():
            p.zero_()
    states = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0))
    for prop, weights in ((True, [0.25, 0.75]), (False, [0.5, 0.5])):
        state = Merging.fresh(1, 2, torch.device("cpu"))
        state.size, state.merged = torch.tensor([[1.0, 3.0]]), True
        with torch.no_grad():
            method = llava_prune.build("tome", tokens=9, prop_attn=prop)
            out = merging_block(layer, method, 0, state, states)
            mixed = (torch.tensor(weights) @ layer.layer_norm1(states)[0]).expand(2, -1)
        torch.testing.assert_close(out[0] - states[0], mixed)
