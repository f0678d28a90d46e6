"""Decode and preprocess images in background threads, ahead of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WORKERS = 4
"""Number of threads; each holds one image."""
Prepared = tuple["Tensor", tuple[int, int]]
"""(3, H, W) pixels for the vision tower, or (crops, 3, H, W), and (width, height) of the image before padding."""


class ImageFeed:
    """Reads images ahead of their use. Outside of its `with` block, `get` reads each image itself.

    Attributes:
        waited: seconds spent in `get` so far.
    """

    def __init__(self, read: Callable[[str], Prepared]) -> None:
        """Create a feed; no image is read yet.

        Args:
            read: reads and preprocesses an image by its name; `get` raises its ValueErrors.
        """
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._found: dict[str, Future[Prepared]] = {}
        self.waited = 0.0

    def __enter__(self) -> ImageFeed:
        self._pool = ThreadPoolExecutor(WORKERS, "images")
        return self

    def __exit__(self, *args: object) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._found.clear()

    def order(self, names: Iterable[str]) -> None:
        """Start reading images in the background. They are held until `drop`."""
        for name in names:
            if self._pool is not None and name not in self._found:
                self._found[name] = self._pool.submit(self._read, name)

    def get(self, name: str) -> Prepared:
        """Return an image, waiting until it is ready.

        Raises:
            ValueError: for an image that cannot be read.
        """
        start = time.perf_counter()
        found = self._found.get(name)
        out = self._read(name) if found is None else found.result()
        self.waited += time.perf_counter() - start
        return out

    def drop(self, names: Iterable[str]) -> None:
        """Release images."""
        for name in names:
            self._found.pop(name, None)
