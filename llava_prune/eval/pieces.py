"""The questions of a benchmark in pieces, the unit of work of one process, and in batches.

Both follow from the questions alone, never from the number of processes or from what is answered already: a question
is always asked in the same company, so that its answer has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .task import Question

SMALLEST, LARGEST = 16, 64
"""Questions of a piece where no image has more; the largest batch of `asking.auto_batch`, too."""
PIECES = 64
"""Pieces that a benchmark is split into at least, as far as `SMALLEST` allows."""


def piece_size(total: int, batch: int | None) -> int:
    """Questions of a piece: enough for a batch, and few enough that many processes end at about the same time.

    Args:
        total: number of questions.
        batch: batch size that the user asked for; None for automatic.
    """
    return max(batch or 1, min(LARGEST, max(SMALLEST, total // PIECES)))


def pieces(questions: Mapping[int, Question], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Question numbers in pieces, those with the longest prompts first.

    The questions of an image are in one piece, so that one process encodes it. Questions without an image are in pieces
    of their own.

    Args:
        questions: number -> question.
        lengths: prompt length of every question of the benchmark.
        size: questions of a piece; more only where an image has more.
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
    """The batches of a whole evaluation with a given batch size, see `pieces` and `batches`."""
    size = piece_size(len(questions), batch)
    return [some for part in pieces(questions, lengths, size) for some in batches(part, lengths, batch)]


def batches(numbers: Iterable[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Question numbers of a piece in batches of similar length, the longest first.

    Args:
        numbers: question numbers, all with an image or all without one.
        lengths: prompt length of every question of the benchmark.
        size: largest batch.
    """
    some = sorted(numbers, key=lambda i: (-lengths[i], i))
    return [some[i : i + size] for i in range(0, len(some), size)]
