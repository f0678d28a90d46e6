"""A file to which one process appends in the background."""

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
    """A locked file to which a background thread appends text.

    The thread flushes the text to disk, so that the caller need not wait for the disk.

    Attributes:
        path: path of the file, which `close` removes if it is empty.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, creating it if it is missing, and lock it.

        Raises:
            ValueError: if another process holds the lock.
        """
        self.path = path
        self._file = self._open()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._queue: list[Future[None]] = []

    def _open(self) -> FileIO:
        """Open the file and lock it, again if an earlier run removed the opened file in the meantime."""
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
                    f"another run is writing to {self.path.parent}; wait for it, or give another folder (OUT or --out)"
                ) from error
            handle.close()

    def _is_current(self, handle: FileIO) -> bool:
        """Return whether the path still refers to this file; an earlier run may have removed it in the meantime."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(handle.fileno()), os.stat(self.path))
        return False

    @property
    def empty(self) -> bool:
        """Whether the file is empty."""
        return os.fstat(self._file.fileno()).st_size == 0

    def append(self, text: str) -> None:
        """Queue text for the end of the file.

        Raises:
            OSError: if text queued earlier could not be written; nothing is written after it.
        """
        while self._queue and self._queue[0].done():
            self._queue[0].result()
            self._queue.pop(0)
        if text:
            self._queue.append(self._thread.submit(self._write, text.encode("utf-8"), list(self._queue)))

    def _write(self, rest: bytes, before: list[Future[None]]) -> None:
        """Append text and flush it to disk, after all earlier writes."""
        for written in before:
            written.result()  # raises if an earlier write failed, so that the file never has a gap
        while rest:  # with a full disk, a part is written before the next call raises
            rest = rest[self._file.write(rest) or 0 :]
        os.fsync(self._file.fileno())

    def flush(self) -> None:
        """Wait until all text is on disk.

        Raises:
            OSError: if it could not be written.
        """
        for written in self._queue:
            written.result()
        self._queue.clear()

    def truncate(self, size: int) -> None:
        """Cut the file off after `size` bytes."""
        self._file.truncate(size)

    def close(self) -> None:
        """Write the queued text as far as possible and close the file."""
        self._thread.shutdown()
        with contextlib.suppress(OSError):
            if self.empty:
                self.path.unlink()
        self._file.close()
