"""The mask of patches that show padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_prune.runtime.vision import batch_padding, padding_mask


def literal(width: int, height: int, cells: int) -> torch.Tensor:
    """Mask every pixel of the square, then take the pixels that nearest-neighbour resizing takes."""
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


def test_mask_turns_with_the_image() -> None:
    assert torch.equal(padding_mask((200, 90), (6, 6)), padding_mask((90, 200), (6, 6)).T)
    assert padding_mask((600, 100), (6, 6)).any(1).tolist() == [True, True, False, False, False, True]


def test_batches() -> None:
    both = batch_padding([(200, 90), (50, 50)], 2, (6, 6))
    assert both is not None and both.shape == (2, 36)
    assert both.any(1).tolist() == [True, False]
    beams = batch_padding([(200, 90), (50, 50)], 6, (6, 6))
    assert beams is not None and beams.any(1).tolist() == [True] * 3 + [False] * 3
    assert batch_padding(None, 2, (6, 6)) is None
    for sizes in ([(200, 90), (9, 9)], []):
        with pytest.raises(ValueError, match="image sizes for 5 images"):
            batch_padding(sizes, 5, (6, 6))
