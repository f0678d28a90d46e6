"""Images decoded and preprocessed in background threads, ahead of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WORKERS = 4
"""Threads; each holds one image."""
Prepared = tuple["Tensor", tuple[int, int]]
"""(3, H, W) pixels of the vision tower's input, and (width, height) of the image before padding."""


class ImageFeed:
    """Reads images that will be needed soon. Use as a context manager; outside of it `get` reads them itself.

    Attributes:
        waited: seconds that `get` waited.
    """

    def __init__(self, read: Callable[[str], Prepared]) -> None:
        """Read nothing yet.

        Args:
            read: reads and preprocesses an image by its name; a ValueError is raised by `get`.
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
        """Read images in the background; they are held until `drop`."""
        for name in names:
            if self._pool is not None and name not in self._found:
                self._found[name] = self._pool.submit(self._read, name)

    def get(self, name: str) -> Prepared:
        """An image, waiting for it where it is not ready.

        Raises:
            ValueError: for an image that cannot be read.
        """
        start = time.perf_counter()
        found = self._found.get(name)
        out = self._read(name) if found is None else found.result()
        self.waited += time.perf_counter() - start
        return out

    def drop(self, names: Iterable[str]) -> None:
        """Forget images."""
        for name in names:
            self._found.pop(name, None)
