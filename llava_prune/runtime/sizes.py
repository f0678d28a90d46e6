"""Sizes of the images before padding, which callers of transformers' Llava give before a request."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .state import Hints, Sizes, with_hints

_OPEN: dict[int, int] = {}
"""Thread -> number of open `image_sizes` blocks with known sizes."""
_LOCK = threading.Lock()


@contextmanager
def image_sizes(sizes: Sequence[Sequence[int]] | None) -> Iterator[None]:
    """Give methods the (width, height) of the images before padding, in the order of the pixel values.

    LLaVA's own classes take the sizes as the argument `image_sizes`; with transformers' Llava, call `generate()` inside
    this block. Without sizes, no patch counts as padding. A thread does not inherit the block: start it with
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`, or open the block inside the
    thread. A request from a thread that does neither while the block is open raises an error.

    Args:
        sizes: one (width, height) for each image; None if the sizes are unknown.

    Raises:
        ValueError: if an entry is not a pair of positive integers.
    """
    made = None if sizes is None else checked_sizes(sizes)
    thread = threading.get_ident()
    with _LOCK:
        _OPEN[thread] = _OPEN.get(thread, 0) + (made is not None)
    try:
        with with_hints(image_sizes=made, sizes_given=True):
            yield
    finally:
        with _LOCK:
            _OPEN[thread] -= made is not None
            if not _OPEN[thread]:
                del _OPEN[thread]


def checked_sizes(sizes: Any) -> Sizes:
    """Return image sizes as a list of (width, height).

    Raises:
        ValueError: if this is not a list of pairs of positive integers.
    """
    out: Sizes = []
    if not isinstance(sizes, Iterable):
        raise ValueError(f"image sizes {sizes!r}: give one (width, height) for each image, as [(640, 480)]")
    for size in sizes:
        try:
            width, height = (int(x) for x in size)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"image size {size!r}: give one (width, height) for each image, as [(640, 480)] for a single one"
            ) from error
        if width <= 0 or height <= 0:
            raise ValueError(f"image size {(width, height)}: width and height must be positive")
        out.append((width, height))
    return out


def known_sizes(given: Hints) -> Sizes | None:
    """Return the sizes of a request's images, or None if they are unknown.

    Raises:
        ValueError: if an `image_sizes` block is open in another thread and this thread has not inherited it.
    """
    with _LOCK:
        elsewhere = not given.sizes_given and any(thread != threading.get_ident() for thread in _OPEN)
    if elsewhere:
        raise ValueError(
            "image_sizes(...) is open in another thread, and threads do not inherit it; start the thread with "
            "Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...), or open "
            "image_sizes(...) inside the thread (image_sizes(None) where the sizes are unknown)"
        )
    return given.image_sizes
