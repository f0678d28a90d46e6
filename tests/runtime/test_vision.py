"""Which patches show padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_prune
from llava_prune.runtime.vision import batch_padding, padding_mask
from llava_prune.runtime.request import SIZES


def literal(width: int, height: int, cells: int) -> torch.Tensor:
    """Mask every pixel of the square, then look at the pixel that nearest resizing takes."""
    side = max(width, height)
    mask = torch.ones(side, side, dtype=torch.bool)
    border = (side + 23) // 24
    if width > height:
        mask[max((width - height) // 2 - border, 0) : min((width + height) // 2 + border, side)] = False
    elif height > width:
        mask[:, max((height - width) // 2 - border, 0) : min((width + height) // 2 + border, side)] = False
    else:
        mask[:] = False
    at = [i * side // cells for i in range(cells)]
    return mask[at][:, at]


@given(st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=60)
def test_mask_is_that_of_the_pixels(width: int, height: int) -> None:
    assert torch.equal(padding_mask((width, height), (24, 24)), literal(width, height, 24))


def test_mask_turns_with_the_picture() -> None:
    assert torch.equal(padding_mask((200, 90), (6, 6)), padding_mask((90, 200), (6, 6)).T)
    assert padding_mask((600, 100), (6, 6)).any(1).tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_sizes_must_be_positive(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        padding_mask(size, (24, 24))


def test_batches() -> None:
    both = batch_padding([(200, 90), (50, 50)], 2, (6, 6))
    assert both is not None and both.shape == (2, 36)
    assert both.any(1).tolist() == [True, False]
    assert batch_padding(None, 2, (6, 6)) is None
    assert batch_padding([(200, 90)], 5, (6, 6)) is None  # crops of one picture


def test_sizes_hold_for_the_block_only() -> None:
    with llava_prune.image_sizes([(3, 4)]):
        assert SIZES.get() == [(3, 4)]
        with llava_prune.image_sizes(None):
            assert SIZES.get() is None
    assert SIZES.get() is None
    with pytest.raises(KeyError), llava_prune.image_sizes([(3, 4)]):
        raise KeyError
    assert SIZES.get() is None
