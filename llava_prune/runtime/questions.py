"""Questions about the images, given before a request for methods that compare patches with text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .state import with_hints


@contextmanager
def questions(texts: Sequence[str] | None) -> Iterator[None]:
    """Give methods the questions of the requests inside the block, without image token and chat template.

    Args:
        texts: one question for each image, in the order of the images; None if there are no questions.

    Raises:
        ValueError: if `texts` is not a list of strings.
    """
    if texts is not None and (isinstance(texts, str) or not all(isinstance(t, str) for t in texts)):
        raise ValueError(f"questions {texts!r}: must be a list of strings, one for each image")
    with with_hints(questions=None if texts is None else list(texts)):
        yield
