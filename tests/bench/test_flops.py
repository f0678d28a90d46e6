"""Equation (2) by hand, and the text lengths that give the published percentages."""

from __future__ import annotations

import pytest

from llava_prune.bench.flops import (
    Size,
    average_tokens,
    flops_visual_only,
    flops_with_text,
    percent_with_text,
    table,
    text_for_percent,
)
from llava_prune.ops.counts import layer_flops

PUBLISHED = {192: 42.9, 128: 33.7, 64: 23.2}


def test_by_hand() -> None:
    assert layer_flops(3, 2, 5) == 4 * 3 * 4 + 2 * 9 * 2 + 3 * 3 * 2 * 5
    size = Size(layers=2, hidden=2, intermediate=5, visual=3)
    assert flops_visual_only([3, 1], size) == layer_flops(3, 2, 5) + layer_flops(1, 2, 5)
    assert flops_with_text([3, 1], 2, size) == layer_flops(5, 2, 5) + layer_flops(3, 2, 5)
    assert percent_with_text([3, 3], 7, size) == 100
    assert average_tokens([3, 1]) == 2
    with pytest.raises(ValueError, match="n=-1"):
        layer_flops(-1, 2, 5)


def test_text_lengths_of_the_published_percentages() -> None:
    rows = table(list(PUBLISHED), [0.0, 0.1, 0.2], Size(), 70, list(PUBLISHED.values()))
    assert len(rows) == 3 * 7
    ranges = {"nominal": (94, 107), "entering": (70, 84), "leaving": (94, 107)}
    for row in rows:
        low, high = ranges[row.counting]
        assert row.text_for_published is not None and low < row.text_for_published < high
        assert row.percent_visual_only < row.percent_with_text
    slow = {r.tokens: r.average for r in rows if r.counting == "leaving" and r.slope == 0.2}
    assert slow == pytest.approx({192: 192, 128: 128, 64: 64}, abs=0.5)


def test_text_length_solves_the_equation() -> None:
    text = text_for_percent([64] * 32, 23.2, Size())
    assert text is not None and percent_with_text([64] * 32, text, Size()) == pytest.approx(23.2)
    assert text_for_percent([64] * 32, 5.0, Size()) is None


def test_limits_are_named() -> None:
    with pytest.raises(ValueError, match="1..576"):
        table([577], [0.1], Size(), 70)
    with pytest.raises(ValueError, match="one for each"):
        table([64], [0.1], Size(), 70, [1.0, 2.0])
