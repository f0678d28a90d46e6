"""FLOPs of the decoder by equation (2) of the paper, and averages of token counts.

Every name says what is counted: visual tokens alone or with text, and tokens entering or leaving each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..methods.autoprune import AutoPrune, Schedule, schedule
from ..ops.counts import Size, layer_flops, percent_visual_only
from ..ops.counts import flops_visual_only as flops_visual_only


def flops_with_text(counts: Sequence[float], text: float, size: Size) -> float:
    """Return equation (2) with n_i = visual tokens of layer i plus `text` tokens, which are never pruned."""
    return sum(layer_flops(n + text, size.hidden, size.intermediate) for n in counts)


def percent_with_text(counts: Sequence[float], text: float, size: Size) -> float:
    """Return `flops_with_text` in percent of the unpruned model's FLOPs with the same text."""
    return 100 * flops_with_text(counts, text, size) / flops_with_text([size.visual] * len(counts), text, size)


def average_tokens(counts: Sequence[float]) -> float:
    """Return the mean over layers.

    The mean of leaving counts is the budget in the papers' tables; the mean of entering counts measures the work.
    """
    return sum(counts) / len(counts)


def ragged_padding(batches: Iterable[Sequence[Sequence[int]]]) -> float:
    """Return padding tokens over real tokens: the cost of samples of unequal length in one batch.

    Args:
        batches: real tokens of each sample (outer) in each layer (inner).
    """
    real = total = 0
    for samples in batches:
        real += sum(map(sum, samples))
        total += len(samples) * sum(map(max, zip(*samples, strict=True)))
    return total / real - 1


def text_for_percent(counts: Sequence[float], percent: float, size: Size) -> float | None:
    """Return the number of text tokens at which `percent_with_text` is `percent`, found by bisection.

    The share grows with the text while the counts are below the unpruned ones. Returns None if no number of text tokens
    in 0..10,000 gives `percent`.
    """
    low, high = 0.0, 10_000.0
    if not percent_with_text(counts, low, size) <= percent <= percent_with_text(counts, high, size):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if percent_with_text(counts, middle, size) < percent else (low, middle)
    return (low + high) / 2


def autoprune_schedule(tokens: int, slope: float, size: Size) -> Schedule:
    """Return AutoPrune's schedule for a budget, with its midpoint for this number of layers."""
    return schedule(slope, tokens, size.visual, size.layers, AutoPrune().midpoint(size.layers))


@dataclass(frozen=True)
class Row:
    """One row of the table of `llava-prune flops`.

    Attributes:
        tokens: budget.
        counting: "nominal" (the budget in every layer), "entering" or "leaving" (counts of AutoPrune's schedule).
        slope: slope of the schedule; None for nominal counts.
        average: mean of the counts over layers.
        percent_visual_only: percentage of the unpruned model's FLOPs, visual tokens alone.
        percent_with_text: the same with `text` text tokens.
        published: published percentage, or None.
        text_for_published: number of text tokens that gives the published percentage, or None.
    """

    tokens: int
    counting: str
    slope: float | None
    average: float
    percent_visual_only: float
    percent_with_text: float
    published: float | None
    text_for_published: float | None


def table(
    budgets: Sequence[int], slopes: Sequence[float], size: Size, text: float, published: Sequence[float] = ()
) -> list[Row]:
    """Return the FLOPs of each budget under each way of counting tokens.

    Args:
        budgets: token budgets.
        slopes: slopes of AutoPrune's curve (0 to 0.4).
        size: the model.
        text: text tokens in `percent_with_text`.
        published: published percentages, one for each budget; or none.

    Raises:
        ValueError: if the number of published percentages differs from that of budgets, or for a budget outside
            1..visual.
    """
    if published and len(published) != len(budgets):
        raise ValueError(f"{len(published)} published percentages for {len(budgets)} budgets; give one for each")
    rows = []
    for i, tokens in enumerate(budgets):
        if not 1 <= tokens <= size.visual:
            raise ValueError(f"tokens={tokens} is outside 1..{size.visual}; give at most the visual tokens of an image")
        goal = published[i] if published else None
        ways: list[tuple[str, float | None, Sequence[float]]] = [("nominal", None, [tokens] * size.layers)]
        for slope in slopes:
            plan = autoprune_schedule(tokens, slope, size)
            ways += [("entering", slope, plan.entering(size.visual)), ("leaving", slope, plan.leaving)]
        for counting, at, counts in ways:
            shares = percent_visual_only(counts, size), percent_with_text(counts, text, size)
            found = None if goal is None else text_for_percent(counts, goal, size)
            rows.append(Row(tokens, counting, at, average_tokens(counts), *shares, goal, found))
    return rows
