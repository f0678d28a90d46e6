"""The retention curve and the search for its scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava_prune.methods.autoprune import logistic, schedule
from llava_prune.ops.clustering import recycled

BUDGETS = ["after", "before"]


@pytest.mark.parametrize(
    ("pruned", "expected"),
    [(0, (0, 0)), (-3, (0, 0)), (1, (1, 1)), (3, (1, 1)), (4, (2, 1)), (30, (10, 2)), (60, (19, 2)), (64, (20, 3))],
)
def test_recycled_is_thirty_percent_and_a_tenth_of_that(pruned: int, expected: tuple[int, int]) -> None:
    assert recycled(pruned) == expected


def test_curve_has_its_midpoint_at_x0_plus_slope() -> None:
    assert logistic(0.5, 9.5, 20)[9] == pytest.approx(0.375)
    assert logistic(0.0, 3.0, 12) == [0.375] * 11
    assert logistic(0.2, 14.9, 32)[0] == pytest.approx(0.75 / (1 + math.exp(0.2 * (1 - 15.1))))
    assert logistic(60.0, 1.0, 100)[-1] < 1e-300  # no overflow


def test_worked_numbers_of_the_specification() -> None:
    """Golden case 0 at 64 tokens: slope 0.2252 gives this list, which sums to 32 x 64."""
    expected = [160, 123, 121, 119, 117, 115, 113, 110, 106, 102, 97, 91, 85, 79, 72, 65]
    expected += [58, 51, 45, 38, 33, 28, 23, 20, 16, 14, 11, 10, 8, 7, 6, 5]
    plan = schedule(0.4 - 0.2 * 0.87399, 64, 576, 32, 14.9)
    assert list(plan.leaving) == expected
    assert sum(plan.leaving) == 2048
    assert plan.scale == pytest.approx(1.0510, abs=1e-4)
    assert plan.steps == 14
    assert plan.entering(576) == [576, *expected[:-1]]


def test_flat_curve_misses_the_budget_by_little() -> None:
    plan = schedule(0.0, 64, 576, 32, 14.9)
    assert list(plan.leaving[:4]) == [160, 64, 61, 61]
    assert sum(plan.leaving) == 2054
    assert plan.scale == pytest.approx(0.99609, abs=1e-5)


def literal(slope: float, tokens: int, n: int, depth: int, x0: float) -> list[int]:
    """Return the counts leaving each layer by a literal form of the rules: 200 bisection steps, no shortcut."""
    first = min(int(2.5 * tokens), n)
    curve = [0.75 / (1 + math.exp(slope * (layer - (x0 + slope)))) for layer in range(1, depth)]

    def clusters(d: int) -> int:
        return 0 if d == 0 else min((int(0.3 * d) + 1) // 10 + 1, int(0.3 * d) + 1)

    def cost(factor: float) -> int:
        now, total = first, first
        for r in curve:
            m = min(math.ceil((first - 1) * min(1, factor * r)), min(int(2.5 * tokens), n))
            now = m + clusters(now - m)
            total += now
        return total

    unscaled = [int(torch.tensor(r, dtype=torch.float32) * first) for r in curve]
    best = 1.0
    if abs(sum(unscaled) + unscaled[-1] - depth * tokens) >= 1:
        low, high, gap = 0.0, 20.0, math.inf
        for _ in range(200):
            middle = (low + high) / 2
            c = cost(middle)
            if abs(c - depth * tokens) < gap:
                best, gap = middle, abs(c - depth * tokens)
            if gap < 0.01:
                break
            low, high = (middle, high) if c < depth * tokens else (low, middle)
    out = [first]
    for r in curve:
        product = torch.tensor(float(first - 1), dtype=torch.float32) * torch.tensor(best * r, dtype=torch.float32)
        m = min(math.ceil(product.item()), out[-1])
        out.append(m + clusters(out[-1] - m))
    return out


@given(
    slope=st.floats(0, 1.5),
    tokens=st.integers(20, 400),
    n=st.sampled_from([576, 1728, 2880]),
    depth=st.sampled_from([24, 32, 40]),
    x0=st.floats(4, 20),
)
@settings(max_examples=30)
@example(slope=0.48, tokens=100, n=576, depth=32, x0=8)
@example(slope=0.88, tokens=128, n=576, depth=32, x0=14.9)
@example(slope=1.39, tokens=64, n=576, depth=32, x0=14.9)
def test_search_is_the_specified_one(slope: float, tokens: int, n: int, depth: int, x0: float) -> None:
    assert list(schedule(slope, tokens, n, depth, x0).leaving) == literal(slope, tokens, n, depth, x0)


@given(slope=st.floats(0, 1), tokens=st.integers(1, 600), depth=st.integers(2, 48), budget=st.sampled_from(BUDGETS))
@settings(max_examples=40)
def test_counts_are_possible(slope: float, tokens: int, depth: int, budget: str) -> None:
    """No layer keeps more tokens than enter it, tokens that leave are kept or merged, the mean is near the budget."""
    x0 = 14.9 * depth / 32
    try:
        plan = schedule(slope, tokens, 576, depth, x0, budget)
    except ValueError:
        least = [min(int(2.5 * tokens), 576)]  # every later layer prunes all, merged tokens stay
        while len(least) < depth:
            least.append(recycled(least[-1])[1])
        assert sum(least) + (576 - least[-1] if budget == "before" else 0) > depth * tokens
        return
    assert len(plan.keep) == len(plan.recycle) == len(plan.merged) == len(plan.leaving) == depth
    if tokens >= 576:
        assert set(plan.leaving) == {576}
        return
    assert plan.leaving[0] == min(int(2.5 * tokens), 576)
    for layer in range(1, depth):
        before = plan.leaving[layer - 1]
        assert 0 <= plan.keep[layer] <= before
        assert (plan.recycle[layer], plan.merged[layer]) == recycled(before - plan.keep[layer])
        assert plan.leaving[layer] == plan.keep[layer] + plan.merged[layer] <= before
    counts = plan.leaving if budget == "after" else plan.entering(576)
    if depth >= 12 and 32 <= tokens <= 250 and slope <= 0.4:  # a steep curve cannot reach a large budget
        assert sum(counts) / depth == pytest.approx(tokens, rel=0.08)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_layers": 1}, "2 layers"), ({"tokens": 1}, "at least 2"), ({"tokens": 50, "budget": "before"}, "'after'")],
)
def test_schedules_that_cannot_be(change: dict[str, Any], message: str) -> None:
    fine = {"slope": 0.2, "tokens": 64, "n_visual": 576, "n_layers": 12, "x0": 5.0}
    assert schedule(**fine).leaving
    with pytest.raises(ValueError, match=message):
        schedule(**{**fine, **change})
