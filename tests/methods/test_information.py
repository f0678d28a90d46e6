"""Mutual information and text attention on small maps, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from llava_prune.methods.autoprune import mutual_information
from llava_prune.ops.attention import text_attention


def full(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_each_text_row_with_its_own_patch_tells_half_a_bit_of_half_the_mass() -> None:
    """p = 1/4 twice, p_v / T = 1/8: 2 * 1/4 * log2(1/4 / (1/8 + 1e-6))."""
    rows = torch.tensor([[[[0.5, 0.0], [0.0, 0.5]]]])
    expected = 0.5 * math.log2(0.25 / (0.125 + 1e-6))
    assert mutual_information(rows, full(1, 2), full(1, 2)).item() == pytest.approx(expected, abs=1e-6)


def test_rows_alike_tell_nothing() -> None:
    """p / (p_v / T) is 1 but for the 1e-6, which makes it slightly less."""
    rows = torch.tensor([[[[0.3, 0.1]] * 3]])
    got = mutual_information(rows, full(1, 3), full(1, 2)).item()
    expected = sum(3 * (a / 3) * math.log2((a / 3) / (a / 3 + 1e-6)) for a in (0.3, 0.1))
    assert got == pytest.approx(expected, abs=1e-7)
    assert -1e-5 < got < 0


def test_one_row_tells_nothing() -> None:
    rows = torch.tensor([[[[0.9, 0.05, 0.01]]]])
    assert mutual_information(rows, full(1, 1), full(1, 3)).item() == pytest.approx(0, abs=1e-4)


def test_other_columns_rows_and_samples_do_not_count() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 3, 4, 6, generator=draw) / 6
    text = torch.tensor([[False, True, True, True], [True, True, True, True]])
    visual = torch.tensor([[True, True, False, True, False, False], [True] * 6])
    both = mutual_information(rows, text, visual)
    alone = mutual_information(rows[:1, :, 1:][..., [0, 1, 3]], full(1, 3), full(1, 3))
    assert both.shape == (2, 3)
    assert torch.allclose(both[:1], alone, atol=1e-6)


def test_nothing_there_is_zero_and_never_nan() -> None:
    rows = torch.full((3, 2, 2, 4), float("nan"))
    text = torch.tensor([[False, False], [True, True], [True, True]])
    visual = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    assert mutual_information(rows, text, visual).tolist() == [[0.0, 0.0]] * 3


def test_text_attention_is_a_mean_over_voters_and_heads() -> None:
    rows = torch.arange(24, dtype=torch.float32).view(1, 2, 3, 4)
    text = torch.tensor([[True, False, True]])
    expected = rows[0][:, [0, 2]].mean((0, 1))
    assert torch.allclose(text_attention(rows, text)[0], expected)
    assert text_attention(rows, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0] * 4]
