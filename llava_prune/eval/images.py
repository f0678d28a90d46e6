"""Image preprocessing of haotian-liu/LLaVA: RGB, padding to a square or crops, then CLIP's image processor."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import Image

from ..runtime.geometry import best_resolution, fitted

if TYPE_CHECKING:  # scoring reads no pixels and loads no torch
    from torch import Tensor

CANVAS = 1 << 26
"""Largest padded square, in pixels, that is built as a whole; see `_squeezed`."""
LONGEST = 65_535
"""Largest side of an image in pixels, which is that of a JPEG file."""
RESIZED = 1 << 27
"""Largest number of pixels of an unpadded image after resizing."""


def open_rgb(source: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """Open an image as RGB. Samples of 16 bits are divided by 256; Pillow itself would clip them to 255.

    Args:
        source: an image file, or its bytes.
        name: name of the image for messages; the file by default.

    Raises:
        ValueError: if the image is not readable, or has more pixels than Pillow opens or memory holds.
    """
    name = name or str(source)
    try:
        with Image.open(source) as image:
            deep = image.mode.startswith("I;16")
            return (image.point(lambda sample: sample / 256) if deep else image).convert("RGB")
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"{name} has more than {limit} pixels, Pillow's limit against decompression bombs ({error}); save it with "
            "fewer pixels"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{name} is too large for the memory; save it with fewer pixels") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); give an image file") from error
    except Exception as error:  # every format's decoder raises errors of other types
        detail = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{name} is not a readable image ({detail}); fetch it again") from error


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Pad an image to a square with the image in the middle.

    Source: llava/mm_utils.py, `expand2square`; the offset is rounded down.

    Args:
        image: RGB image.
        colour: colour of the padding, one value for each channel.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    out = Image.new(image.mode, (side, side), colour)
    out.paste(image, ((side - width) // 2, (side - height) // 2))
    return out


def _squeezed(image: Image.Image, colour: tuple[int, ...], size: int, resample: int) -> Image.Image:
    """Return `square(image, colour)` resized to size x size, bit for bit, without building the square.

    Pillow resizes rows first and columns second, so bands of rows can be resized to `size` columns one after another.
    """
    (width, height), side = image.size, max(image.size)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new(image.mode, (size, side), colour)
    step = max(1, CANVAS // side)
    for y in range(0, height, step):
        band = image.crop((0, y, width, min(y + step, height)))
        rows = Image.new(image.mode, (side, band.height), colour)
        rows.paste(band, (left, 0))
        narrow.paste(rows.resize((size, band.height), resample), (0, top + y))
    return narrow.resize((size, size), resample)


def pixels(image: Image.Image, processor: Any, pad: bool = True) -> Tensor:
    """Preprocess an image for the vision tower.

    Args:
        image: RGB image.
        processor: CLIP image processor; its Pillow backend gives the pixels that LLaVA was trained on.
        pad: whether to pad to a square with int(255 * mean) before the processor resizes and crops.

    Returns:
        (3, H, W) float32.

    Raises:
        ValueError: for a side above `LONGEST`, or an unpadded image that resizing would make too large.
    """
    import torch

    (width, height), edge = image.size, _shortest_edge(processor)
    _check_side(image)
    if not pad and edge is not None and edge * edge * max(width, height) > RESIZED * min(width, height):
        raise ValueError(
            f"the image has {width} x {height} pixels, which resizing to a shortest edge of {edge} without padding "
            f"would make more than {RESIZED}; crop it"
        )
    if pad:
        colour = tuple(int(m * 255) for m in processor.image_mean)
        large = edge is not None and max(width, height) ** 2 > CANVAS
        image = _squeezed(image, colour, edge or 0, processor.resample) if large else square(image, colour)
    values = processor(images=image, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(values[0]).float()


def crops(image: Image.Image, processor: Any, resolutions: tuple[tuple[int, int], ...]) -> Tensor:
    """Preprocess an image for a vision tower that sees the whole image and crops of a higher resolution.

    The whole image is resized to a square without keeping its aspect ratio. For the crops, the image is fitted into the
    best resolution, padded with black, and cut into tiles.

    Args:
        image: RGB image.
        processor: CLIP image processor, see `pixels`.
        resolutions: (width, height) of the supported resolutions.

    Returns:
        (1 + crops, 3, H, W) float32, the whole image first.

    Raises:
        ValueError: for a side above `LONGEST`.

    Source: llava/mm_utils.py, `process_anyres_image`.
    """
    import torch

    _check_side(image)
    width, height = target = best_resolution(image.size, resolutions)
    across, down = fitted(image.size, target)
    canvas = Image.new("RGB", target, (0, 0, 0))
    canvas.paste(image.resize((across, down)), ((width - across) // 2, (height - down) // 2))
    side, edge = processor.crop_size["height"], processor.size["shortest_edge"]
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    parts = [image.resize((edge, edge)), *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]
    values = [processor(images=part, return_tensors="pt")["pixel_values"][0] for part in parts]
    return torch.stack([torch.as_tensor(v).float() for v in values])


def _check_side(image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > LONGEST:
        raise ValueError(f"the image has {width} x {height} pixels; a side may have {LONGEST}, crop it")


def _shortest_edge(processor: Any) -> int | None:
    """Return the side that a processor resizes a square to; None if it does not resize."""
    if not getattr(processor, "do_resize", False):
        return None
    size = processor.size
    edge = size.get("shortest_edge") or size.get("height")
    return None if edge is None else int(edge)
