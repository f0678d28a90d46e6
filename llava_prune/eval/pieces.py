"""Split the questions of a benchmark into pieces, the unit of work of one process, and into batches.

Both follow from the questions alone, never from the number of processes or from earlier answers. A question is always
in a batch with the same questions, so its answer has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .task import Question

SMALLEST, LARGEST = 16, 64
"""Smallest and largest default number of questions of a piece, which can have more if one image has more questions. The
latter is also the largest batch of `asking.auto_batch`.
"""
PIECES = 64
"""Number of pieces that a benchmark is split into, or fewer if pieces would be smaller than `SMALLEST`."""


def piece_size(total: int, batch: int | None) -> int:
    """Return the number of questions of a piece.

    It is large enough for a batch, and small enough that many processes finish at about the same time.

    Args:
        total: number of questions.
        batch: requested batch size; None for an automatic one.
    """
    return max(batch or 1, min(LARGEST, max(SMALLEST, total // PIECES)))


def pieces(questions: Mapping[int, Question], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split question numbers into pieces, those with the longest prompts first.

    All questions about an image are in one piece, so that only one process encodes it. Questions without an image are
    in separate pieces.

    Args:
        questions: number -> question.
        lengths: prompt length of every question of the benchmark.
        size: number of questions of a piece, exceeded only by an image with more questions.
    """
    groups: dict[tuple[bool, object], list[int]] = {}
    for number, question in questions.items():
        plain = question.image is None
        groups.setdefault((plain, number if plain else question.image), []).append(number)
    longest = {key: max(lengths[i] for i in group) for key, group in groups.items()}
    out: list[list[int]] = []
    before = None
    for key in sorted(groups, key=lambda k: (k[0], -longest[k], groups[k][0])):
        if key[0] != before or len(out[-1]) + len(groups[key]) > size:
            out.append([])
        out[-1] += groups[key]
        before = key[0]
    return out


def all_batches(questions: Mapping[int, Question], lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Return the batches of a whole evaluation at a given batch size, see `pieces` and `batches`."""
    size = piece_size(len(questions), batch)
    return [some for part in pieces(questions, lengths, size) for some in batches(part, lengths, batch)]


def batches(numbers: Iterable[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split the question numbers of a piece into batches of similar prompt length, the longest first.

    Args:
        numbers: question numbers, all with an image or all without one.
        lengths: prompt length of every question of the benchmark.
        size: largest batch size.
    """
    some = sorted(numbers, key=lambda i: (-lengths[i], i))
    return [some[i : i + size] for i in range(0, len(some), size)]
