"""Images of a finished run, and the number of layers that each patch leaves, for the overlays of a report."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.store import StoredRun
from ..report.thumbnails import Thumbnail
from ..runtime.geometry import Geometry
from .task import Sources, load_task, questions_of

if TYPE_CHECKING:
    from torch import Tensor


def pack_layers(survival: Tensor) -> list[str]:
    """Encode `Record.survival` as one text for each sample, without trailing zeros.

    `thumbnails.unpack_layers` decodes it.
    """
    rows = (bytes(row).rstrip(b"\0") for row in survival.clamp(max=255).tolist())
    return [base64.b64encode(zlib.compress(row, 9)).decode() for row in rows]


def thumbnails(run: StoredRun, rows: Sequence[int], side: int) -> list[Thumbnail | None]:
    """Return small images of some questions of a run, with the places of their visual tokens.

    Args:
        run: a finished run.
        rows: numbers of the questions.
        side: pixels of the longer side.

    Returns:
        One thumbnail for each question; None for a question without an image.

    Raises:
        ValueError: if the data are missing, or an image cannot be read.
    """
    asked, geometry = run.result.get("asked"), run.result.get("geometry")
    if not asked or not geometry:
        raise ValueError(f"{run.folder} was made by a version that did not store where its images are; run it again")
    sources = Sources(load_task(run.bench), Path(asked["data"]))
    questions = questions_of(sources)
    known = Geometry(**{**geometry, **{k: _tuples(geometry[k]) for k in ("grid", "resolutions")}})
    out: list[Thumbnail | None] = []
    for row in rows:
        name = questions[row].image if row < len(questions) else None
        out.append(None if name is None else _thumbnail(sources.image(name), known, side))
    return out


def _thumbnail(image: Any, geometry: Geometry, side: int) -> Thumbnail:
    """Return an image of at most `side` pixels and the boxes of its visual tokens in it."""
    views = geometry.views(image.size)
    scale = min(1.0, side / max(image.size))
    small = image.resize([max(1, round(n * scale)) for n in image.size])
    x, y = small.width / image.width, small.height / image.height
    boxes = [
        (v.first, [None if b is None else (b[0] * x, b[1] * y, b[2] * x, b[3] * y) for b in v.boxes]) for v in views
    ]
    return Thumbnail(small, boxes)


def _tuples(value: Any) -> Any:
    """Convert nested lists from JSON back to tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
