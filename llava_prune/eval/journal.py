"""A file that one process appends to, in the background."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None  # type: ignore[assignment]


class Journal:
    """A locked file. A thread appends text and flushes it to disk, so that the caller need not wait for the disk.

    Attributes:
        path: the file; removed by `close` when it is empty.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, and make it when it is missing.

        Raises:
            ValueError: when another process holds it.
        """
        self.path = path
        self._file = self._open()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._queue: list[Future[None]] = []

    def _open(self) -> FileIO:
        while True:
            handle = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
            if fcntl is None:
                return handle
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(handle):
                    return handle
            except BlockingIOError as error:
                handle.close()
                raise ValueError(
                    f"another run is writing to {self.path.parent}; wait for it, or set OUT to another folder"
                ) from error
            handle.close()

    def _is_current(self, handle: FileIO) -> bool:
        """Whether the path is still this file: the run before may have removed it in between."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(handle.fileno()), os.stat(self.path))
        return False

    @property
    def empty(self) -> bool:
        """Whether nothing is in the file."""
        return os.fstat(self._file.fileno()).st_size == 0

    def append(self, text: str) -> None:
        """Queue text for the end of the file.

        Raises:
            OSError: when text queued earlier could not be written; nothing is written after it.
        """
        while self._queue and self._queue[0].done():
            self._queue[0].result()
            self._queue.pop(0)
        if text:
            self._queue.append(self._thread.submit(self._write, text.encode("utf-8"), list(self._queue)))

    def _write(self, rest: bytes, before: list[Future[None]]) -> None:
        for written in before:
            written.result()  # raises: a file that lacks its middle would be worse than one that lacks its end
        while rest:  # a full disk writes a part before it raises
            rest = rest[self._file.write(rest) or 0 :]
        os.fsync(self._file.fileno())

    def flush(self) -> None:
        """Wait until all text is on disk.

        Raises:
            OSError: when it could not be written.
        """
        for written in self._queue:
            written.result()
        self._queue.clear()

    def truncate(self, size: int) -> None:
        """Cut the file off after `size` bytes."""
        self._file.truncate(size)

    def close(self) -> None:
        """Write what is queued, as far as that works, and close the file."""
        self._thread.shutdown()
        with contextlib.suppress(OSError):
            if self.empty:
                self.path.unlink()
        self._file.close()
