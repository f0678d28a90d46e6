"""Images are read in background threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from llava_prune.eval.feed import WORKERS, ImageFeed


class Reader:
    """A reader that records the thread of each image; it fails for a name that contains "broken"."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.read = seconds, []

    def __call__(self, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        time.sleep(self.seconds)
        self.read.append((name, threading.current_thread().name))
        if "broken" in name:
            raise ValueError(f"{name} is not a readable image")
        return torch.full((3, 2, 2), float(len(name))), (len(name), 1)


def test_read_once_until_dropped() -> None:
    reader = Reader()
    with ImageFeed(reader) as feed:
        feed.order(["a", "bb", "a"])
        assert feed.get("bb")[1] == (2, 1) and feed.get("a")[0].sum() == 12 and feed.get("a")[1] == (1, 1)
        assert sorted(name for name, _ in reader.read) == ["a", "bb"]
        assert all(thread.startswith("images") for _, thread in reader.read)
        feed.drop(["a", "bb"])
        feed.order(["a"])
        feed.get("a")
        assert len(reader.read) == 3


def test_what_was_not_ordered_is_read_at_once() -> None:
    reader = Reader()
    feed = ImageFeed(reader)
    feed.order(["a"])
    assert not reader.read and feed.get("a")[1] == (1, 1)
    assert reader.read == [("a", threading.current_thread().name)]


def test_waiting_is_counted() -> None:
    with ImageFeed(Reader(0.05)) as feed:
        feed.order([str(i) for i in range(WORKERS)])
        feed.get("0")
        assert 0.03 < feed.waited < 0.5
        time.sleep(0.3)
        before = feed.waited
        feed.get("1")
        assert feed.waited - before < 0.01


def test_a_broken_image_is_raised_where_it_is_needed() -> None:
    with ImageFeed(Reader()) as feed:
        feed.order(["fine", "broken"])
        assert feed.get("fine")
        with pytest.raises(ValueError, match="broken is not a readable image"):
            feed.get("broken")
