"""Image preprocessing of haotian-liu/LLaVA: RGB, padding to a square, then CLIP's image processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:  # scoring reads no pixels and loads no torch
    from torch import Tensor


def open_rgb(path: str | Path) -> Image.Image:
    """Open an image file as RGB.

    Raises:
        ValueError: when the file is not a readable image, or has more pixels than Pillow opens.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more pixels than Pillow opens ({error}); scale it down") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); fetch it again") from error


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Pad an image to a square, with the image in the middle.

    Source: llava/mm_utils.py, `expand2square`; the offset is rounded down.

    Args:
        image: RGB image.
        colour: of the padding, one value for each channel.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    out = Image.new(image.mode, (side, side), colour)
    out.paste(image, ((side - width) // 2, (side - height) // 2))
    return out


def pixels(image: Image.Image, processor: Any, pad: bool = True) -> Tensor:
    """The input of the vision tower.

    Args:
        image: RGB image of any size.
        processor: CLIP image processor; its Pillow backend gives the pixels that LLaVA was trained on.
        pad: pad to a square with int(255 * mean) before the processor resizes and crops.

    Returns:
        (3, H, W) float32.
    """
    import torch

    if pad:
        image = square(image, tuple(int(m * 255) for m in processor.image_mean))
    values = processor(images=image, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(values[0]).float()
