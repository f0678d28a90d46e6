"""AutoPrune's arguments for ablations, each against an independent computation."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llava_prune
from llava_prune import ScoreMethod, VisionView
from llava_prune.bench.flops import Size
from llava_prune.bench.methods import method_row
from llava_prune.methods.autoprune import AutoPrune, schedule
from llava_prune.methods.autoprune_flash import AutoPruneFlash
from llava_prune.methods.compose import compose
from llava_prune.ops.clustering import recycled
from tests import models
from tests.contract.test_limits import siglip
from tests.oracle.check import batch, check
from tests.oracle.dense import Dense, _norm, spliced

BEFORE, AFTER = 5, 7
ROW = models.prompt(BEFORE, AFTER)
X0 = 14.9 * models.LAYERS / 32
CLOSE = 2e-4
"""Batched and single matrix products differ by rounding."""


# the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruned", "share", "expected"),
    [(40, 0.0, (0, 0)), (1, 1.0, (1, 1)), (40, 1.0, (40, 5)), (9, 1.0, (9, 1)), (40, 0.5, (21, 3)), (40, 0.01, (1, 1))],
)
def test_share_that_is_clustered(pruned: int, share: float, expected: tuple[int, int]) -> None:
    assert recycled(pruned, share) == expected


def literal(
    slope: float, tokens: int, n: int, depth: int, cap: float, peak: float, share: float, whole: bool, budget: str
) -> list[int]:
    """Return the counts leaving each layer by 200 bisection steps, or one sum that exceeds the budget at factor 0."""
    most = min(int(cap * tokens), n)
    first = n if whole else most
    x0 = 14.9 * depth / 32
    curve = [peak / (1 + math.exp(slope * (layer - (x0 + slope)))) for layer in range(1, depth)]

    def counts(wanted: list[int]) -> list[int]:
        out = [first]
        for want in wanted:
            m = min(want, most, out[-1])
            d = out[-1] - m
            q = min(int(share * d) + 1, d) if share > 0 else 0
            out.append(m + min(q // 10 + 1, q))
        return out

    def cost(factor: float) -> int:
        out = counts([math.ceil((first - 1) * (factor * r)) for r in curve])
        return sum(out) if budget == "after" else n + sum(out[:-1])

    goal, best = depth * tokens, 1.0
    if cost(0.0) > goal:
        return [cost(0.0)]
    low, high, gap = 0.0, 20.0, math.inf
    for _ in range(200):
        middle = (low + high) / 2
        c = cost(middle)
        if abs(c - goal) < gap:
            best, gap = middle, abs(c - goal)
        if gap < 0.01:
            break
        low, high = (middle, high) if c < goal else (low, middle)
    factors = torch.tensor([best * r for r in curve], dtype=torch.float32)
    return counts(torch.ceil(factors * torch.tensor(float(first - 1))).int().tolist())


@given(
    slope=st.floats(0, 0.8),
    tokens=st.integers(12, 300),
    depth=st.sampled_from([12, 32]),
    cap=st.floats(1, 5),
    peak=st.floats(0.05, 1),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.8, 1.0]),
    whole=st.booleans(),
    budget=st.sampled_from(["after", "before"]),
)
@settings(max_examples=60)
@example(slope=0.2, tokens=64, depth=32, cap=1.0, peak=0.75, share=0.0, whole=False, budget="after")
@example(slope=0.0, tokens=64, depth=32, cap=2.0, peak=1.0, share=0.3, whole=False, budget="after")
@example(slope=0.0, tokens=216, depth=32, cap=2.5, peak=0.75, share=0.3, whole=True, budget="after")
@example(slope=0.0, tokens=64, depth=32, cap=1.5, peak=0.75, share=0.3, whole=True, budget="after")
@example(slope=0.2, tokens=64, depth=32, cap=2.5, peak=0.05, share=1.0, whole=False, budget="before")
def test_schedule_with_other_constants(
    slope: float, tokens: int, depth: int, cap: float, peak: float, share: float, whole: bool, budget: str
) -> None:
    n = 576
    method = AutoPrune(
        tokens=tokens,
        budget=budget,  # type: ignore[arg-type]
        first_cap=cap,
        peak=peak,
        recycle=share,
        x0=14.9 * depth / 32,
        first_score="none" if whole else "text",
    )
    want = literal(slope, tokens, n, depth, cap, peak, share, whole, budget)
    if len(want) == 1:
        with pytest.raises(ValueError, match=f"tokens={tokens}: the first layers alone bring the average .* larger"):
            method.schedule_of(slope, n, depth)
        return
    plan = method.schedule_of(slope, n, depth)
    assert list(plan.leaving) == want
    assert plan.leaving[0] == (n if whole else min(int(cap * tokens), n))
    assert max(plan.keep[1:]) <= min(int(cap * tokens), n)
    for layer in range(1, depth):
        d = plan.leaving[layer - 1] - plan.keep[layer]
        assert plan.recycle[layer] == (0 if share == 0 or d == 0 else min(int(share * d) + 1, d)) <= d
        assert plan.leaving[layer] == plan.keep[layer] + plan.merged[layer]


def test_schedules_by_hand() -> None:
    """A flat curve at 8 tokens of 20 in 4 layers."""
    flat = {"slope": 0.0, "tokens": 8, "n_visual": 20, "n_layers": 4, "x0": 1.0}
    assert schedule(**flat, first_cap=1.0, recycle=0.0).leaving == (8, 8, 8, 8)
    off = schedule(**flat, first_cap=1.5, recycle=0.0)  # 12 + 3 m is nearest to 32 for 7 (12 + 18 would be 2 short)
    assert off.leaving == (12, 7, 7, 7) and set(off.recycle) == set(off.merged) == {0}
    whole = schedule(**flat, first=20, first_cap=1.5, recycle=0.0)  # 20 + 3 m
    assert whole.leaving == (20, 4, 4, 4) and whole.entering(20) == [20, 20, 4, 4]
    every = schedule(**flat, first_cap=2.5, recycle=1.0)  # 20, then m and one cluster for up to 9 of those dropped
    assert every.recycle[1] == 20 - every.keep[1] and every.merged[1] == every.recycle[1] // 10 + 1


def test_peak_is_scaled_away() -> None:
    """At usual slopes, counts depend on the product of factor and peak; another peak changes them by at most 1."""
    different = 0
    for tokens in (64, 128, 192):
        for step in range(0, 41, 2):
            usual, *others = (schedule(step / 100, tokens, 576, 32, 14.9, peak=p).leaving for p in (0.75, 0.2, 1.0))
            assert all(abs(a - b) <= 1 for other in others for a, b in zip(usual, other, strict=True))
            different += sum(other != usual for other in others)
    assert different <= 3
    low = schedule(0.2, 64, 576, 32, 14.9, peak=0.01)  # the factor ends at 20
    assert 19.9 < low.scale < 20 and sum(low.leaving) < 32 * 24


@pytest.mark.parametrize("recycle", [0.0, 1.0])
def test_smallest_budget(recycle: float) -> None:
    """The smallest budget, 2, gives 5 tokens in the first layer and leaves at least one in every layer."""
    plan = schedule(0.2, 2, 576, 32, 14.9, recycle=recycle)
    assert plan.leaving[0] == 5 and sum(plan.leaving) == pytest.approx(64, abs=4) and min(plan.leaving) >= 1
    assert sum(plan.merged) == 0 or recycle > 0


# what layer 0 ranks by ------------------------------------------------------------------------------------------


def class_attention(model: Any, given: Any) -> torch.Tensor:
    """Return (36,) attention of the class token on the patches in the block of the features, from the tower itself."""
    seen: dict[str, Any] = {}
    attention = model.model.vision_tower.encoder.layers[2].self_attn
    stock, attention.config._attn_implementation = attention.config._attn_implementation, "eager"
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(weights=output[1]))
    try:
        with torch.inference_mode():
            model(**given)
    finally:
        hook.remove()
        attention.config._attn_implementation = stock
    return seen["weights"][0, :, 0, 1:].mean(0).double()


def text_rows(model: Any, given: Any) -> torch.Tensor:
    """Return (36,) attention of the text after the image on the image in layer 0, mean over heads and text tokens."""
    dense, states = Dense(model), spliced(model, given).embeds[0].double()
    normed = _norm(dense.lm.layers[0].input_layernorm, states)
    _, weight = dense.attention(0, normed, torch.arange(len(states)))
    return weight[:, -AFTER:, BEFORE : BEFORE + models.PATCHES].mean((0, 1))


def best(score: torch.Tensor, count: int) -> list[int]:
    return sorted(score.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize("name", ["autoprune", "autoprune-flash"])
def test_first_score(name: str, tiny_models: dict[str, Any]) -> None:
    given = models.inputs(tiny_models["hf"], [ROW], models.pixels(1))
    cls, text = class_attention(tiny_models["hf"], given), text_rows(tiny_models["hf"], given)
    found = {}
    for model in (tiny_models["hf"], tiny_models["llava"]):
        asked = models.inputs(model, [ROW], models.pixels(1))
        for first in ("equation1", "text", "class", "none"):
            hyper = {"tokens": 9, "first_cap": 1.4, "lam": 5, "first_score": first}
            with llava_prune.pruned(model, name, check=True, **hyper) as handle, torch.inference_mode():
                model(**asked)
                record = handle.last
            equation = 5 * record.stats["mi0"][0] * text + cls
            want = {
                "equation1": best(equation, 12),
                "text": best(text, 12),
                "class": best(cls, 12),
                "none": list(range(models.PATCHES)),
            }
            assert record.kept[0].tolist() == [want[first]], first
            assert record.tokens_out[0].tolist() == literal(
                record.stats["slope"][0], 9, models.PATCHES, models.LAYERS, 1.4, 0.75, 0.3, first == "none", "after"
            )
            found[first] = tuple(want[first])
    assert len(set(found.values())) == 4, "each ranks otherwise"


def test_no_class_token_needed() -> None:
    """First scores that do not use the class token work with a tower without one."""
    model = siglip()
    given = models.inputs(model, [ROW], models.pixels(1))
    for first in ("text", "none"):
        assert AutoPrune(first_score=first).vision_queries(2) == {}  # type: ignore[arg-type]
        with llava_prune.pruned(model, "autoprune", tokens=9, first_score=first, check=True) as handle:
            models.generate(model, given, 2)
            assert handle.last.tokens_out[0, 0] == (models.PATCHES if first == "none" else 22)
    for first in ("equation1", "class"):
        with pytest.raises(ValueError, match="autoprune needs the class token of a CLIP tower"):
            llava_prune.attach(model, "autoprune", tokens=9, first_score=first)


# slope, recycling, positions ------------------------------------------------------------------------------------


def test_one_slope_for_every_question(tiny: Any) -> None:
    method = AutoPrune(tokens=9, fixed_slope=0.7, slope_step=0.4, mi_scale=20)
    asked = models.inputs(tiny, [ROW, models.prompt(3, 4, seed=1)], models.pixels(2))
    with llava_prune.pruned(tiny, method) as handle, torch.inference_mode():
        tiny(**asked)
        record = handle.last
    plan = schedule(0.7, 9, models.PATCHES, models.LAYERS, X0)
    assert record.stats["slope"] == [0.7, 0.7] and len(set(record.stats["mi1"])) == 2
    assert record.tokens_out.tolist() == [list(plan.leaving)] * 2
    assert method.plan(models.PATCHES, models.LAYERS) == record.tokens_in[0].tolist()
    entering, leaving, note = method.example(models.PATCHES, models.LAYERS)
    assert (entering, leaving) == (record.tokens_in[0].tolist(), list(plan.leaving))
    assert note == "slope 0.7; the same for every question"
    assert AutoPrune(fixed_slope=0).slope(0.0) == 0 and AutoPrune().plan(576, 32) is None


@pytest.mark.parametrize("cls", [AutoPrune, AutoPruneFlash])
def test_recycling_off(cls: Any, tiny: Any) -> None:
    asked = models.inputs(tiny, [ROW, models.prompt(3, 4, seed=1)], models.pixels(2))
    for recycle in (0, 0.3):
        with llava_prune.pruned(tiny, cls(tokens=9, recycle=recycle), check=True) as handle:
            models.generate(tiny, asked, 2)
            record = handle.last
        merged = [bool((kept == -1).any()) for kept in record.kept]
        assert any(merged) == (recycle > 0)
        want = [schedule(k, 9, models.PATCHES, models.LAYERS, X0, recycle=recycle) for k in record.stats["slope"]]
        assert record.tokens_out.tolist() == [list(p.leaving) for p in want]


def turned(lm: Any, layers: list[torch.Tensor]) -> list[list[int]]:
    """Return the position ids that rotary tables (1, L, dh) belong to."""
    cos, _ = lm.rotary_emb(torch.zeros(1, 1, models.WIDTH), torch.arange(80)[None])
    return [[int((cos[0] - row).abs().sum(1).argmin()) for row in layer[0]] for layer in layers]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_positions(positions: str, tiny: Any) -> None:
    """Position ids of the prompt and of two generated tokens, read from the rotary tables that the layers receive."""
    method = AutoPrune(tokens=9, k0=1.2, positions=positions)  # type: ignore[arg-type]
    lm = models.language_model(tiny)
    seen: list[list[torch.Tensor]] = [[] for _ in lm.layers]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mine=mine: mine.append(kwargs["position_embeddings"][0]), with_kwargs=True
        )
        for layer, mine in zip(lm.layers, seen, strict=True)
    ]
    try:
        with llava_prune.pruned(tiny, method, check=True) as handle:
            models.generate(tiny, models.inputs(tiny, [ROW], models.pixels(1)), 3)
            kept = [k[0].tolist() for k in handle.last.kept]
    finally:
        for hook in hooks:
            hook.remove()
    length = BEFORE + models.PATCHES + AFTER
    image, merges = list(range(BEFORE, length - AFTER)), 0
    for layer, (prompt, first, second) in enumerate(turned(lm, mine) for mine in seen):
        rows = [*range(BEFORE), *image, *range(length - AFTER, length)]
        if positions == "keep":
            assert prompt == rows and (first, second) == ([length], [length + 1])
        else:
            assert prompt == list(range(len(rows))) and (first, second) == ([len(rows)], [len(rows) + 1])
        end = max(image)  # the position of merged tokens
        image = [end if i == -1 else BEFORE + i for i in kept[layer]]
        merges += kept[layer].count(-1)
    assert merges and len(image) < 9


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("autoprune", "equation1"),
        ("autoprune-flash", "class"),
        ("visionzip+autoprune", "equation1"),
        ("tome+autoprune", "text"),
    ],
)
def test_kept_positions_against_the_dense_model(name: str, first: str, tiny: Any) -> None:
    """A ragged batch with merged tokens equals the dense model in the logits of the prompt and of generated tokens."""
    hyper = {"positions": "keep", "recycle": 0.6, "mi_scale": 20, "gamma": 0.05, "first_score": first}
    method: Any = llava_prune.build(name, tokens=9, **hyper)
    assert (method.positions, method.decode) == ("keep", "original")
    check(tiny, method, batch(tiny, "padded"))


ALL: list[dict[str, Any]] = [
    {"first_score": "none", "positions": "keep", "recycle": 0.7, "first_cap": 1.5, "peak": 0.4, "mi_scale": 20},
    {"first_score": "text", "recycle": 1, "first_cap": 3.0, "mi_scale": 20, "strict": False},
    {"first_score": "class", "positions": "keep", "recycle": 0, "fixed_slope": 0.3, "first_cap": 1.2},
]


@pytest.mark.parametrize("hyper", ALL, ids=[h["first_score"] for h in ALL])
def test_alone_as_in_a_batch(hyper: dict[str, Any], tiny: Any) -> None:
    rows, pixels = [ROW, models.prompt(9, 2, seed=1), models.prompt(2, 12, seed=2)], models.pixels(3)
    with llava_prune.pruned(tiny, "autoprune", tokens=14, k0=1.5, gamma=0.02, check=True, **hyper) as handle:
        out = models.generate(tiny, models.inputs(tiny, rows, pixels), 2)
        together, counts = handle.last, {tuple(n) for n in handle.last.tokens_out.tolist()}
        assert (len(counts) > 1) == ("fixed_slope" not in hyper), "questions have schedules of their own"
        for b, row in enumerate(rows):
            single = models.generate(tiny, models.inputs(tiny, [row], pixels[b : b + 1]), 2)
            for mine, alone in zip(together.kept, handle.last.kept, strict=True):
                assert mine[b][mine[b] != -2].tolist() == alone[0].tolist()
            assert torch.allclose(out.logits[0][b], single.logits[0][0], atol=CLOSE)
            if out.sequences[b, 0] == single.sequences[0, 0]:
                assert torch.allclose(out.logits[1][b], single.logits[1][0], atol=CLOSE)


# attributes that arguments decide -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Norm(ScoreMethod):
    """A method that needs no attention of the tower."""

    tokens: int = 64

    def vision_scores(self, view: VisionView) -> torch.Tensor:
        return view.features.norm(dim=2)


def test_instances_and_compositions() -> None:
    """Copies keep attributes that an argument decides; a composition takes them from its second part."""
    method = AutoPrune(positions="keep", first_score="text")
    for other in (pickle.loads(pickle.dumps(method)), dataclasses.replace(method, tokens=12)):
        assert (other.positions, other.decode, other.requires) == ("keep", "original", frozenset())
    back = dataclasses.replace(method, positions="renumber", first_score="class")
    assert (back.decode, back.requires) == ("cache", {"class token"})
    plain: Any = llava_prune.build("tome+autoprune", first_score="none", positions="keep")
    assert plain.language.positions == plain.positions == "keep" and plain.decode == "original"
    assert compose("norm+autoprune", Norm, AutoPrune)(first_score="text").requires == frozenset()
    assert any(llava_prune.build("tome+autoprune", tokens=9, first_score="none").merge_schedule(2, models.PATCHES))
    row = method_row("autoprune", 64, Size(), 70)
    assert (row.positions, row.decode) == ("renumber", "cache")


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"first_cap": 0.9}, r"first_cap=0.9: must be a finite number in \[1, 1e\+06\]"),
        ({"peak": 0}, r"peak=0: must be a finite number in \[1e-09, 1\]"),
        ({"peak": 1.1}, r"peak=1.1: must be a finite number in \[1e-09, 1\]"),
        ({"recycle": 1.5}, r"recycle=1.5: must be a finite number in \[0, 1\]"),
        ({"recycle": -0.1}, r"recycle=-0.1: must be a finite number in \[0, 1\]"),
        ({"recycle": None}, "recycle=None: must be a finite number in"),
        ({"fixed_slope": -1}, r"fixed_slope=-1: must be a finite number in \[0, 1e\+06\]"),
        ({"first_score": "cls"}, "first_score='cls': must be 'equation1' or 'text' or 'class' or 'none'"),
        ({"first_score": None}, "first_score=None: must be 'equation1' or"),
        ({"positions": "original"}, "positions='original': must be 'renumber' or 'keep'"),
    ],
)
def test_refusals(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava_prune.build("autoprune", **hyper)


def test_budgets_below_a_whole_first_layer() -> None:
    """All 576 tokens leave layer 0 of 32, which alone costs 18 tokens on average; clusters stay in the next layers."""
    method = AutoPrune(tokens=18, first_score="none", fixed_slope=0.2)
    with pytest.raises(ValueError, match="tokens=18: the first layers alone bring the average .* to 19.[0-9] for 576"):
        method.plan(576, 32)
    assert dataclasses.replace(method, recycle=0.0).plan(576, 32) == [576, 576, *[1] * 30]
