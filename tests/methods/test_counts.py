"""Counts of the methods that prune at a few layers: budgets, presets, published arithmetic, refusals."""

from __future__ import annotations

from typing import Any

import pytest

import llava_prune
from llava_prune.bench.flops import Size, percent_visual_only, percent_with_text
from llava_prune.methods.registry import presets
from llava_prune.methods.sparsevlm import chain

NAMES = ("fastv", "vtw", "pdrop", "sparsevlm", "topv")


def plan(name: str, n_visual: int = 576, n_layers: int = 32, **hyper: Any) -> list[int]:
    counts = llava_prune.build(name, **hyper).plan(n_visual, n_layers)
    assert counts is not None and len(counts) == n_layers
    return counts


def mean(counts: list[int]) -> float:
    return sum(counts) / len(counts)


def leaving(name: str, n_visual: int = 576, n_layers: int = 32, **hyper: Any) -> list[int]:
    shown = llava_prune.build(name, **hyper).example(n_visual, n_layers)
    assert shown is not None
    return shown[1]


@pytest.mark.parametrize(
    ("hyper", "layers", "full", "keep"),
    [
        ({"tokens": 192}, 32, 2, 166),
        ({"tokens": 128}, 32, 2, 98),
        ({"tokens": 64}, 32, 2, 30),
        ({"tokens": 192, "layer": 3}, 32, 3, 152),
        ({"tokens": 128, "layer": 3}, 32, 3, 82),
        ({"tokens": 64, "layer": 3}, 32, 3, 11),
        ({"tokens": 288}, 40, 2, 273),
        ({"tokens": 144}, 40, 2, 121),
        ({"tokens": 58}, 40, 2, 31),
        ({"tokens": 64}, 12, 1, 17),  # two full layers of twelve would cost 96
        ({"keep": 0.25}, 32, 2, 144),
        ({"keep": 0.111}, 32, 2, 64),  # int() would give 63
        ({}, 32, 2, 288),
    ],
)
def test_fastv(hyper: dict[str, Any], layers: int, full: int, keep: int) -> None:
    assert plan("fastv", 576, layers, **hyper) == [576] * full + [keep] * (layers - full)


def test_fastv_averages_of_the_specification() -> None:
    assert mean(plan("fastv", layer=2, keep=166)) == 191.625
    assert [mean(plan(f"fastv:keep{b}")) for b in (192, 128, 64)] == [216, 156, 96]
    shares = [percent_with_text(plan(f"fastv:one{b}"), 118, Size()) for b in (192, 128, 64)]
    assert shares == pytest.approx([100 * x / 4.62 for x in (2.113, 1.702, 1.294)], abs=0.1)


@pytest.mark.parametrize(("tokens", "layer"), [(192, 11), (128, 7), (64, 4)])
def test_vtw_takes_the_nearest_layer(tokens: int, layer: int) -> None:
    assert plan("vtw", tokens=tokens) == [576] * layer + [0] * (32 - layer)


def test_vtw_half_of_the_flops() -> None:
    assert plan("vtw:half") == plan("vtw") == plan("vtw", layer=16) == plan("vtw:k16")
    assert plan("vtw", 576, 40) == plan("vtw:k20", 576, 40)
    assert mean(plan("vtw", layer=16)) == 288 and mean(plan("vtw:k15")) == 270
    assert percent_visual_only(plan("vtw", layer=16), Size()) == pytest.approx(50)
    assert percent_with_text(plan("vtw", layer=16), 64, Size()) == pytest.approx(54.9, abs=0.05)
    assert plan("vtw", layer=32) == [576] * 32 and plan("vtw", layer=0) == [0] * 32


def test_pyramiddrop_arithmetic() -> None:
    default = plan("pdrop")
    assert default == plan("pdrop", layers=[8, 16, 24], ratios=[0.5, 0.25, 0.125]) == plan("pdrop:official")
    assert default == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8 and mean(default) == 270
    assert [n + 74 for n in default[::8]] == [650, 362, 218, 146]  # first positions of generated tokens
    assert mean(plan("pdrop", 576, 40)) == 270 and mean(plan("pdrop:official", 576, 40)) == 230.4
    stages = plan("pdrop:192-stages")
    assert stages[::8] == [576, 146, 37, 9] and mean(stages) == 192
    assert plan("pdrop", 2343, layers=[8, 16, 24], ratios=[0.5, 0.25, 0.125])[-1] == 292
    assert mean(plan("pdrop:128-script")) == pytest.approx(128, abs=0.1)
    assert mean(plan("pdrop:64-script")) == pytest.approx(63.8, abs=0.3)
    assert mean(plan("pdrop:128-fork")) == 128


@pytest.mark.parametrize(("tokens", "share"), [(192, 0.56), (128, 0.42), (64, 0.19)])
def test_pyramiddrop_budgets_follow_the_authors_recipe(tokens: int, share: float) -> None:
    explicit = plan("pdrop", layers=[2, 8, 16], ratios=[share, share**2, share**3])
    assert plan("pdrop", tokens=tokens) == explicit


def test_sparsevlm_chains_of_the_specification() -> None:
    assert chain(576, (300, 200, 110), True) == [(300, 83, 9), (200, 33, 4), (110, 29, 3)]
    assert chain(576, (303, 110, 36), True) == [(303, 82, 9), (110, 61, 7), (36, 25, 3)]
    assert chain(576, (66, 30, 17), True) == [(66, 154, 16), (30, 16, 2), (17, 5, 1)]
    assert chain(5, (9, 9), True) == [(4, 1, 1), (4, 1, 1)]  # at least one is dropped


@pytest.mark.parametrize(
    ("hyper", "after", "before"),
    [
        ({"tokens": 192}, 192.03125, 206.5),
        ({"tokens": 128}, 128.625, 145.41),
        ({"tokens": 64}, 64.8125, 82.25),
        ({"tokens": 96}, 96.94, 114.1),
        ({"tokens": 192, "version": "2.0"}, 192.44, None),
        ({"tokens": 128, "version": "2.0"}, 128.0, None),
        ({"tokens": 96, "version": "2.0"}, 96.81, None),
        ({"tokens": 64, "version": "2.0"}, 64.44, None),
    ],
)
def test_sparsevlm_averages(hyper: dict[str, Any], after: float, before: float | None) -> None:
    assert mean(leaving("sparsevlm", **hyper)) == pytest.approx(after, abs=0.01)
    if before is not None:
        assert mean(plan("sparsevlm", **hyper)) == pytest.approx(before, abs=0.05)


def test_sparsevlm_lengths() -> None:
    counts = plan("sparsevlm", tokens=192)
    assert [n + 74 for n in (counts[2], counts[3], counts[7], counts[16])] == [650, 383, 278, 187]


@pytest.mark.parametrize(
    ("flops", "two", "three"), [(0.53, 291, 281), (0.51, 278, 268), (0.5, 272, 261), (0.49, 266, 255), (0.35, 179, 166)]
)
def test_topv_by_flops(flops: float, two: int, three: int) -> None:
    assert plan("topv", flops=flops)[1:] == [576] + [two] * 30
    assert plan("topv", flops=flops, full_layers=3)[2:] == [576] + [three] * 29


def test_topv_recovery_counts_inside_a_budget_and_beside_a_share() -> None:
    topv = llava_prune.build("topv", flops=0.51, r=4)
    assert topv.setting(576, 32) == (2, 178, 100)
    assert llava_prune.build("topv:recover6").setting(576, 32) == (2, 218, 60)
    assert llava_prune.build("topv", rho=180 / 576, r=4).setting(576, 32) == (2, 180, 99)
    assert llava_prune.build("topv", rho=180 / 576).setting(576, 32) == (2, 180, 0)
    assert [plan("topv", tokens=b)[-1] for b in (192, 128, 64)] == [166, 98, 30]


MODELS = [(576, 32, (192, 128, 64)), (576, 40, (288, 144, 58)), (2880, 32, (640, 320, 160)), (576, 12, (192, 128, 64))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n_visual", "n_layers", "budgets"), MODELS)
def test_every_budget_is_met_on_every_model(name: str, n_visual: int, n_layers: int, budgets: tuple[int, ...]) -> None:
    for tokens in budgets:
        average = leaving if name == "sparsevlm" else plan
        counts = average(name, n_visual, n_layers, tokens=tokens)
        assert counts == sorted(counts, reverse=True)
        near = n_visual / n_layers / 2 if name == "vtw" else max(0.03 * tokens, 1)  # whole layers only
        assert abs(mean(counts) - tokens) <= near, (tokens, counts)
    assert plan(name, n_visual, n_layers, tokens=n_visual) == [n_visual] * n_layers
    assert plan(name, 0, n_layers, tokens=64) == [0] * n_layers


@pytest.mark.parametrize("name", NAMES)
def test_presets_build_and_plan(name: str) -> None:
    table = {**presets(name), **{str(n): {"tokens": n} for n in (192, 128, 64, 288, 144, 58, 640, 320, 160)}}
    for preset, values in table.items():
        tokens = values.get("tokens", 0)
        n_visual, n_layers = (2880, 32) if tokens in (640, 320, 160) else (576, 40 if tokens in (288, 144, 58) else 32)
        method = llava_prune.build(f"{name}:{preset}")
        assert {k: v for k, v in method.hyper().items() if k in values} == values
        counts = method.plan(n_visual, n_layers)
        assert counts is None if values.get("version") == "1.0" else counts is not None and min(counts) < n_visual


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("fastv", {"tokens": 64, "keep": 30}, "give one of tokens, keep"),
        ("fastv", {"keep": 1.5}, r"keep=1.5: must be a finite number in"),
        ("fastv", {"layer": 0}, "layer=0: must be a positive integer"),
        ("vtw", {"tokens": 64, "layer": 4}, "give one of"),
        ("vtw", {"flops": 2}, "flops=2"),
        ("pdrop", {"layers": [8, 4, 16]}, "ascending"),
        ("pdrop", {"ratios": [0.1, 0.5, 0.2]}, "cannot be larger"),
        ("pdrop", {"layers": [8], "ratios": [0.5, 0.2]}, "1 layers and 2 ratios"),
        ("pdrop", {"score": "mean"}, "must be 'next' or 'finished'"),
        ("sparsevlm", {"version": "3"}, "version='3'"),
        ("sparsevlm", {"tokens": 100, "version": "1.0"}, "give scale"),
        ("sparsevlm", {"retain": [5]}, "one count for each"),
        ("topv", {"tokens": 64, "rho": 0.3}, "give one of"),
        ("topv", {"tau": 1.5}, "tau=1.5"),
    ],
)
def test_refused_arguments(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava_prune.build(name, **hyper)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("fastv", {"tokens": 48}, "tokens=48: 1 full layer"),
        ("fastv", {"layer": 12, "keep": 5}, "this model has 12 layers"),
        ("vtw", {"layer": 13}, "give at most 12"),
        ("pdrop", {"tokens": 40}, "tokens=40"),
        ("pdrop", {"layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.125]}, "this model has 12 layers"),
        ("sparsevlm", {"layers": [2, 12], "retain": [9, 9]}, "this model has 12 layers"),
        ("topv", {"tokens": 48}, "tokens=48"),
        ("topv", {"full_layers": 12}, "this model has 12 layers"),
    ],
)
def test_refused_where_the_model_is_known(name: str, hyper: dict[str, Any], message: str) -> None:
    method = llava_prune.build(name, **hyper)
    with pytest.raises(ValueError, match=message):
        method.plan(576, 12)


@pytest.mark.parametrize("name", ["fastv", "dart", "topv"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_few_layers(name: str, layers: int) -> None:
    """With few layers, the plan has the full layers that the cut needs, or an error says what to change."""
    hyper: dict[str, Any] = {} if name == "topv" else {"keep": 64}
    try:
        counts = plan(name, n_layers=layers, **hyper)
    except ValueError as error:
        assert name == "topv" and "exceed that; give more" in str(error)
    else:
        assert counts[0] == 576 and (layers == 1 or counts[-1] < 576)


@pytest.mark.parametrize(
    "hyper", [{"heads": 14}, {"heads": 14, "version": "1.0"}, {"bias": 3}, {"bias": 3, "version": "2.0"}]
)
def test_sparsevlm_refuses_arguments_of_other_versions(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="version"):
        llava_prune.build("sparsevlm", tokens=192, **hyper)
