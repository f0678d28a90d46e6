"""Pictures as haotian-liu/LLaVA prepares them: RGB, padded to a square, CLIP's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def open_rgb(path: str | Path) -> Image.Image:
    """A picture file as an RGB image.

    Raises:
        ValueError: when the file is no readable picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable picture ({error}); fetch it again") from error


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side.

    Source: llava/mm_utils.py, `expand2square`: the offset is rounded down.

    Args:
        image: RGB picture.
        colour: fill, one value a channel.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    out = Image.new(image.mode, (side, side), colour)
    out.paste(image, ((side - width) // 2, (side - height) // 2))
    return out


def pixels(image: Image.Image, processor: Any, pad: bool = True) -> Tensor:
    """The tower's input.

    Args:
        image: RGB picture of any size.
        processor: CLIP image processor (its Pillow backend gives the pixels LLaVA was trained on).
        pad: pad to a square with int(mean * 255) before the processor's resize and centre crop.

    Returns:
        (3, H, W) float32.
    """
    if pad:
        image = square(image, tuple(int(m * 255) for m in processor.image_mean))
    values = processor(images=image, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(values[0]).float()
