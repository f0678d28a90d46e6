"""The retention curve and the search for its scale."""

from __future__ import annotations

import math

import pytest

from llava_prune.core.budget import logistic, recycled, schedule


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
