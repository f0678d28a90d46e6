"""Map visual tokens to boxes in the user's image, undoing padding, resizing and cropping. Plain Python, no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the user's image."""
LEAST_RATIO = 1.1
"""Largest ratio of side lengths at which a stitched grid is not interpolated (LLaVA-OneVision)."""
ENTIRE, CROPPED = "image", "crops"
"""Names of views, see `ImageView`."""


@dataclass(frozen=True)
class ImageView:
    """A run of visual tokens whose patches tile an image.

    Attributes:
        name: "image" for the image encoded as a whole, "crops" for all crops of LLaVA-NeXT together.
        first: index of the first token among the visual tokens of the image.
        boxes: box of each token; None for tokens that show padding only, newline tokens and class tokens.
    """

    name: str
    first: int
    boxes: tuple[Box | None, ...]


@dataclass(frozen=True)
class Geometry:
    """How a model turns images into visual tokens.

    Attributes:
        grid: (rows, columns) of patches in an image or crop.
        side: side of the tower's square input in pixels.
        padded: whether images are padded to a square. Otherwise their shorter side is resized to `side` and the centre
            is cropped.
        leading: number of tokens before the patches of an image (the class token, if the model keeps it).
        resolutions: (width, height) pairs at which images are split into crops (LLaVA-NeXT); empty if images are
            encoded whole.
        merge: how crops become a sequence: "spatial_unpad", "spatial" or "flat"; see `mm_patch_merge_type` of LLaVA.
        unpad_decimals: decimals to which the unpadded side length is rounded before it is truncated; None for no
            rounding.
        max_crops: limit of the number of crops, above which the tokens of an image are interpolated to the number of
            patches of this many crops (LLaVA-OneVision's anyres_max); None for no limit.
    """

    grid: tuple[int, int]
    side: int
    padded: bool = True
    leading: int = 0
    resolutions: tuple[tuple[int, int], ...] = ()
    merge: str = "spatial_unpad"
    unpad_decimals: int | None = None
    max_crops: int | None = None

    def views(self, size: tuple[int, int]) -> list[ImageView]:
        """Return the visual tokens of an image, grouped into views, in sequence order.

        Args:
            size: (width, height) of the user's image.
        """
        if not self.resolutions:
            place = _padded(size) if self.padded else _cropped(size, self.side)
            boxes = _boxes(size, self.grid, range(self.grid[0]), range(self.grid[1]), place)
            return [ImageView(ENTIRE, 0, (*[None] * self.leading, *boxes))]
        rows, columns = self.grid
        width, height = size
        whole = tuple(_boxes(size, self.grid, range(rows), range(columns), (0, 0, width, height)))
        return [ImageView(ENTIRE, 0, whole), ImageView(CROPPED, len(whole), tuple(self._crops(size)))]

    def count(self, size: tuple[int, int]) -> int:
        """Return the number of visual tokens of an image of (width, height)."""
        return sum(len(view.boxes) for view in self.views(size))

    def _crops(self, size: tuple[int, int]) -> Iterator[Box | None]:
        """Yield the boxes of the tokens that follow those of the whole image.

        Source: llava/mm_utils.py `process_anyres_image` and llava_arch.py; transformers' image processor and
        `pack_image_features` of LlavaNext do the same except for `digits`.
        """
        target = best_resolution(size, self.resolutions)
        across, down = target[0] // self.side, target[1] // self.side
        grid = self.grid[0] * down, self.grid[1] * across
        place = _pasted(size, target)
        if self.merge == "flat":
            for crop in range(down * across):
                top, left = crop // across * self.grid[0], crop % across * self.grid[1]
                yield from _boxes(size, grid, range(top, top + self.grid[0]), range(left, left + self.grid[1]), place)
            return
        unpad = "unpad" in self.merge
        rows, columns = self._unpadded(size, grid) if unpad else (range(grid[0]), range(grid[1]))
        place, grid, rows, columns = self._interpolated(place, grid, rows, columns)
        for row in rows:
            yield from _boxes(size, grid, [row], columns, place)
            yield from [None] * unpad  # the newline token

    def _interpolated(
        self, place: Box, grid: tuple[int, int], rows: range, columns: range
    ) -> tuple[Box, tuple[int, int], range, range]:
        """Return a part of a stitched grid, made coarser if the model limits the number of its tokens.

        Source: `pack_image_features` of transformers' LlavaOnevision.
        """
        if self.max_crops is None:
            return place, grid, rows, columns
        ratio = math.sqrt(len(rows) * len(columns) / (self.max_crops * self.grid[0] ** 2))
        if ratio <= LEAST_RATIO:
            return place, grid, rows, columns
        left, top, right, bottom = place
        width, height = (right - left) / grid[1], (bottom - top) / grid[0]
        start, stop = (columns.start, rows.start), (columns.stop, rows.stop)
        part = (left + start[0] * width, top + start[1] * height, left + stop[0] * width, top + stop[1] * height)
        coarse = int(len(rows) // ratio), int(len(columns) // ratio)
        return part, coarse, range(coarse[0]), range(coarse[1])

    def _unpadded(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[range, range]:
        """Return the rows and columns of the stitched grid without padding. Source: `unpad_image` of both packages."""
        (width, height), (rows, columns) = size, grid
        if width / height > columns / rows:
            gap = (rows - self._whole(height * (columns / width))) // 2
            return range(gap, rows - gap), range(columns)
        gap = (columns - self._whole(width * (rows / height))) // 2
        return range(rows), range(gap, columns - gap)

    def _whole(self, value: float) -> int:
        return int(value if self.unpad_decimals is None else round(value, self.unpad_decimals))


def best_resolution(size: tuple[int, int], resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the (width, height) at which an image is split into crops.

    The resolution that keeps most pixels of the image is chosen; among equals, the one with the least padding, then the
    first one. Source: `select_best_resolution` of both packages.
    """
    width, height = size

    def key(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[0] / width, target[1] / height)
        seen = min(int(width * scale) * int(height * scale), width * height)
        return seen, seen - target[0] * target[1]

    return max(resolutions, key=key)


def fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of an image of `size` after resizing it into `target` with its aspect ratio kept.

    Source: `resize_and_pad_image` of llava/mm_utils.py.
    """
    (width, height), x, y = size, target[0] / size[0], target[1] / size[1]
    if x < y:
        return target[0], min(math.ceil(height * x), target[1])
    return min(math.ceil(width * y), target[0]), target[1]


# the box of the tower's input in the user's image, which may be larger or smaller than the image -----------------


def _padded(size: tuple[int, int]) -> Box:
    """Return the box of an image that is padded to a square and centred in it (offset rounded down)."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


def _cropped(size: tuple[int, int], side: int) -> Box:
    """Return the box of a centre crop after the shorter side was resized to `side`.

    Source: CLIP's image processor of transformers.
    """
    width, height = size
    short = min(size)
    new_width, new_height = (side if n == short else int(side * n / short) for n in size)
    x, y = width / new_width, height / new_height
    left, top = (new_width - side) // 2 * x, (new_height - side) // 2 * y
    return left, top, left + side * x, top + side * y


def _pasted(size: tuple[int, int], target: tuple[int, int]) -> Box:
    """Return the box of an image that is resized into `target` with its aspect ratio kept and padded in black."""
    width, height = size
    new_width, new_height = fitted(size, target)
    x, y = width / new_width, height / new_height
    left, top = -((target[0] - new_width) // 2) * x, -((target[1] - new_height) // 2) * y
    return left, top, left + target[0] * x, top + target[1] * y


def _boxes(
    size: tuple[int, int], grid: tuple[int, int], rows: range | list[int], columns: range, place: Box
) -> Iterator[Box | None]:
    """Yield the boxes of some cells of a grid over `place`, clipped to the image; None for a cell outside the image."""
    left, top, right, bottom = place
    width, height = (right - left) / grid[1], (bottom - top) / grid[0]
    for row in rows:
        for column in columns:
            box = (
                max(left + column * width, 0),
                max(top + row * height, 0),
                min(left + (column + 1) * width, size[0]),
                min(top + (row + 1) * height, size[1]),
            )
            yield box if box[0] < box[2] and box[1] < box[3] else None


@dataclass(frozen=True)
class Seen:
    """The images of a prefill of B samples.

    Attributes:
        geometry: the geometry of the model.
        n_visual: number of visual tokens of each sample before pruning.
        sizes: (width, height) of the images, if the caller has given them.
    """

    geometry: Geometry
    n_visual: tuple[int, ...]
    sizes: list[tuple[int, int]] | None = None

    def views(self, size: tuple[int, int], sample: int = 0, padded: bool | None = None) -> list[ImageView]:
        """Return the visual tokens of a sample, grouped into views of its image.

        Args:
            size: (width, height) of the sample's image.
            sample: number of the sample in the batch.
            padded: overrides `Geometry.padded`.

        Raises:
            ValueError: for a sample that does not exist or does not have exactly one image, for a size that is not
                that of its image, and for `padded` on a model that splits images into crops.
        """
        batch = len(self.n_visual)
        if not isinstance(sample, Integral) or not 0 <= sample < batch:
            raise ValueError(f"sample={sample!r}: the last prefill has {batch} samples; give 0 to {batch - 1}")
        if padded is not None and self.geometry.resolutions:
            raise ValueError(f"padded={padded}: this model sees images in crops, whose padding is known; leave it out")
        geometry = self.geometry if padded is None else replace(self.geometry, padded=padded)
        given, views = self.n_visual[sample], geometry.views(size)
        if not given:
            raise ValueError(f"sample={sample} has no image; choose a sample with one")
        expected = sum(len(view.boxes) for view in views)
        known = self._size(sample)
        if given % expected == 0 and given > expected:
            raise ValueError(
                f"sample={sample} has {given} visual tokens, and an image of {size[0]} x {size[1]} pixels has "
                f"{expected}: a sample with several images cannot be drawn; ask about one image at a time"
            )
        if given != expected or (known is not None and known != size):
            was = f"an image with {given} visual tokens" if known is None else f"one of {known[0]} x {known[1]} pixels"
            raise ValueError(
                f"an image of {size[0]} x {size[1]} pixels ({expected} visual tokens) is not what sample {sample} was "
                f"asked about, {was}; give the image as it was before preprocessing"
            )
        return views

    def _size(self, sample: int) -> tuple[int, int] | None:
        """Return the size that the caller gave for the image of a sample, or None if it is not known."""
        if not self.sizes:
            return None
        patches = self.geometry.grid[0] * self.geometry.grid[1] + self.geometry.leading
        counts = [min(n, 1) if self.geometry.resolutions else n // patches for n in self.n_visual]
        if sum(counts) % len(self.sizes):  # package llava uses a blank image for each sample without an image
            counts = [max(n, 1) for n in counts]
        beams, rest = divmod(sum(counts), len(self.sizes))
        if rest or counts[sample] != 1:
            return None
        return self.sizes[sum(counts[:sample]) // beams]
