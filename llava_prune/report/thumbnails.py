"""Images inside a report, with the patches that each run keeps after each layer."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .store import StoredRun

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 336
"""Longer side of an image in pixels."""
FIRST = 63
"""Code point that stands for layer 0 when layers are written as characters."""


@dataclass(frozen=True)
class Thumbnail:
    """A small image with the places of its visual tokens.

    Attributes:
        image: the RGB image.
        views: for each view, its first token and the boxes of its tokens in pixels (None for tokens without a place),
            see `runtime.geometry.ImageView`.
    """

    image: Image
    views: list[tuple[int, list[tuple[float, float, float, float] | None]]]


Images = Callable[[StoredRun, Sequence[int], int], Sequence["Thumbnail | None"]]
"""Type of a function from (run, numbers of questions, longer side in pixels) to images; see
`eval.run_images.thumbnails`.
"""


def unpack_layers(packed: str) -> bytes:
    """Decode the field `kept.patches` of an answer: the number of layers that each visual token leaves.

    Trailing zeros are not stored.
    """
    return zlib.decompress(base64.b64decode(packed))


def shown_first(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of all questions, starting with those whose scores differ between runs.

    Args:
        runs: runs with their `scores`, as in `questions.columns`.
    """
    scores = list(zip(*(run["scores"] for run in runs), strict=True))
    return sorted(range(len(scores)), key=lambda i: len(set(scores[i])) == 1)


def with_images(found: dict[str, Any], runs: Sequence[StoredRun], images: Images, count: int) -> None:
    """Add the images of up to `count` questions, and the patches that each run keeps of them, to a benchmark's columns.

    Args:
        found: the columns, see `questions.columns`; this function adds `images` (number of a question -> image) and
            `places`, and adds `patches` and `layers` to each of its runs.
        runs: the finished runs of the columns.
        images: returns the images of questions.
        count: largest number of images.

    Raises:
        ValueError: see `images`.
    """
    rows = shown_first(found["runs"])[:count]
    kept = [_kept(run) for run in runs]
    rows = [i for i in rows if any(k[i] for k in kept)]
    places: dict[str, int] = {}
    shown = {}
    for i, thumbnail in zip(rows, images(runs[0], rows, SIDE) if rows else (), strict=True):
        if thumbnail is not None:
            views = [{"first": first, "boxes": [_box(b) for b in boxes]} for first, boxes in thumbnail.views]
            image = thumbnail.image
            number = places.setdefault(repr((image.size, views)), len(places))
            if number == len(found.setdefault("places", [])):
                found["places"].append({"width": image.width, "height": image.height, "views": views})
            shown[str(i)] = {"source": _jpeg(image), "place": number}
    found["images"] = shown
    for run, values, stored in zip(found["runs"], kept, runs, strict=True):
        run["layers"] = len(stored.result["visual_tokens"]["entering_by_layer"])
        run["patches"] = {
            i: "".join(chr(FIRST + n) for n in unpack_layers(packed))
            for i in shown
            if (packed := values[int(i)]) is not None
        }


def _kept(run: StoredRun) -> list[str | None]:
    return [row.get("kept", {}).get("patches") for row in run.answers()]


def _box(box: tuple[float, float, float, float] | None) -> list[float] | None:
    return None if box is None else [round(x, 1) for x in box]


def _jpeg(image: Image) -> str:
    """Return a data URL of an image."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
