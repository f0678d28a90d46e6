"""Sizes of the images before padding, which callers of transformers' Llava say ahead of a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .state import Hints, Sizes, hinting

_OPEN: dict[int, int] = {}
"""Thread -> open blocks of `image_sizes` with sizes."""
_LOCK = threading.Lock()


@contextmanager
def image_sizes(sizes: Sequence[Sequence[int]] | None) -> Iterator[None]:
    """Tell methods the (width, height) of the images before padding, in the order of the pixel values.

    LLaVA's own classes get them as the argument `image_sizes`; with transformers' Llava wrap `generate()` in this.
    Without them no patch counts as padding. A thread does not inherit the block: start it with
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`, or open the block inside the
    thread. A request from a thread that does neither, while the block is open, raises an error.

    Args:
        sizes: one (width, height) for each image; None says that the sizes are unknown.

    Raises:
        ValueError: for anything but pairs of positive integers.
    """
    made = None if sizes is None else checked_sizes(sizes)
    thread = threading.get_ident()
    with _LOCK:
        _OPEN[thread] = _OPEN.get(thread, 0) + (made is not None)
    try:
        with hinting(image_sizes=made, explicit=True):
            yield
    finally:
        with _LOCK:
            _OPEN[thread] -= made is not None
            if not _OPEN[thread]:
                del _OPEN[thread]


def checked_sizes(sizes: Any) -> Sizes:
    """Image sizes as a list of (width, height).

    Raises:
        ValueError: for anything but pairs of positive integers.
    """
    out: Sizes = []
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
    """The sizes of a request's images.

    Raises:
        ValueError: when another thread has an open block of `image_sizes` which this thread does not see.
    """
    with _LOCK:
        elsewhere = not given.explicit and any(thread != threading.get_ident() for thread in _OPEN)
    if elsewhere:
        raise ValueError(
            "image_sizes(...) is open in another thread, and threads do not inherit it; start the thread with "
            "Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...), or open "
            "image_sizes(...) inside the thread (image_sizes(None) where the sizes are unknown)"
        )
    return given.image_sizes
