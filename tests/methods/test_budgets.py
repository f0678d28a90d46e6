"""Budgets in percent of tokens and of FLOPs, and the labels of requests."""

from __future__ import annotations

from typing import Any

import pytest

from llava_prune.arguments import budgets, flops_budgets
from llava_prune.methods.budgets import flops_percent, tokens_for
from llava_prune.methods.planner import Request, cases, cases_of, plan
from llava_prune.methods.registry import build
from llava_prune.ops.counts import FlopsShare, Size, TokenShare

SMALL = Size(layers=12, hidden=128, intermediate=344, visual=144)


def equation_2(counts: list[int], size: Size) -> float:
    """Return the percentage of the unpruned model's FLOPs by Equation (2), written out."""
    d, m = size.hidden, size.intermediate
    full = size.layers * (4 * size.visual * d**2 + 2 * size.visual**2 * d + 3 * size.visual * d * m)
    return 100 * sum(4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m for n in counts) / full


@pytest.mark.parametrize("name", ["autoprune", "fastv", "vtw", "topv", "pdrop", "random", "visionzip+autoprune"])
@pytest.mark.parametrize("percent", [20.0, 49.0, 77.5])
def test_no_other_budget_is_nearer(name: str, percent: float) -> None:
    found = tokens_for(FlopsShare(percent), name, {}, SMALL)
    gaps = {}
    for tokens in range(1, SMALL.visual + 1):
        try:
            example = build(name, tokens=tokens).example(SMALL.visual, SMALL.layers)
        except ValueError:
            continue
        assert example is not None
        gaps[tokens] = abs(equation_2(example[0], SMALL) - percent)
    assert gaps[found] == pytest.approx(min(gaps.values()))
    assert flops_percent(name, {"tokens": found}, SMALL) == pytest.approx(percent, abs=gaps[found] + 1e-9)


def test_the_middle_layer_is_half_of_the_flops() -> None:
    found = tokens_for(FlopsShare(50), "vtw", {}, Size())
    assert build("vtw", tokens=found).plan(576, 32) == [576] * 16 + [0] * 16


def test_shares_of_the_visual_tokens() -> None:
    assert tokens_for(TokenShare(11), "autoprune", {}, Size()) == 63
    assert tokens_for(TokenShare(11), "autoprune", {}, Size(visual=2880)) == 317
    assert tokens_for(TokenShare(0.01), "random", {}, Size()) == 1
    assert tokens_for(7, "random", {}, None) == 7


def test_refused_shares() -> None:
    with pytest.raises(ValueError, match=r"vtw cannot go down to 2% of the FLOPs: .* 8.3%"):
        tokens_for(FlopsShare(2), "vtw", {}, SMALL)
    with pytest.raises(ValueError, match="depends on the model"):
        tokens_for(TokenShare(11), "random", {}, None)


def test_how_they_are_written() -> None:
    assert budgets("192,11%") == [192, TokenShare(11)] and flops_budgets("49%, 2.5%") == [
        FlopsShare(49),
        FlopsShare(2.5),
    ]
    for read, text in ((budgets, "0%"), (budgets, "101%"), (budgets, "x%"), (flops_budgets, "49"), (flops_budgets, "")):
        with pytest.raises(Exception, match="must be"):
            read(text)


def test_requests_have_hyper_parameters_in_their_labels() -> None:
    """Labels leave out values that the run would have anyway, so that equal runs have equal labels."""
    found = cases_of(
        [
            Request(["autoprune", "random"], [64], {"gamma": 0.0}),
            Request(["autoprune"], [64, 8], {"gamma": 0.2}),
            Request(["autoprune"], [64], {"gamma": 0.1, "budget": "before"}),
            Request(["random"], [64], {"seed": 3}),
        ],
        {"k0": 0.3},
        seed=5,
    )
    assert [c.label for c in found] == [
        "autoprune-64,gamma=0.0", "random-64", "autoprune-64", "autoprune-8", "autoprune-64,gamma=0.1,budget=before",
        "random-64,seed=3",
    ]  # fmt: skip
    methods = {r.label: r.method.hyper() for r in plan(found)}
    assert methods["autoprune-64,gamma=0.0"]["gamma"] == 0 and methods["autoprune-64"]["gamma"] == 0.2
    assert {m["k0"] for name, m in methods.items() if name.startswith("auto")} == {0.3}
    assert methods["random-64"]["seed"] == 5 and methods["random-64,seed=3"]["seed"] == 3


def test_labels_are_names_of_folders() -> None:
    for value in ("../x", [1] * 200, "a b", None, True):
        (case,) = cases_of([Request(["autoprune"], [64], {"mask_padding": value})])
        assert "/" not in case.label and " " not in case.label and len(case.label) <= 100


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"nosuch": 1}, "none of random has a hyper-parameter nosuch"),
        ({"tokens": 1}, "tokens=1: the budget has a flag"),
    ],
)
def test_refused_hyper_parameters(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases_of([Request(["random"], [64], hyper)])


def test_budgets_of_the_same_tokens_are_one_case() -> None:
    found = cases(["random"], [63, TokenShare(11), FlopsShare(100)], size=Size())
    assert [c.tokens for c in found] == [63, 576]
