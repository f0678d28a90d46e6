"""Auxiliary supervision of the training: the positions of nouns, options and answers, and the facts about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from playground.tiny import nouns as ns
from playground.tiny import scenes as sc
from playground.tiny import tokenizer as tk
from playground.tiny.bank import TYPES, Item, pack

MODEL = Path(__file__).parents[2] / "playground" / "models" / "llava-tiny"
RED, BLUE = sc.COLOUR_NAMES.index("red"), sc.COLOUR_NAMES.index("blue")
CIRCLE, SQUARE = sc.SHAPES.index("circle"), sc.SHAPES.index("square")


def packed(text: str, answer: str):
    """Return a batch of one question."""
    model = tk.load(MODEL)
    ids = tuple(model.encode(f"\n{text} ASSISTANT:"))
    item = Item(ids, ids, (*model.encode(answer), model.eos_id()), 0)
    return pack([[item]], np.zeros(1, int), 120, np.random.default_rng(0), 1.0, np.ones(len(TYPES)))


def table(*things: tuple[float, ...]) -> np.ndarray:
    """Return the (1, 8, 6) table of one scene: shape, colour, size, mark, x and y of each thing."""
    rows = np.full((1, 8, 6), -1.0, np.float32)
    rows[0, : len(things)] = things
    return rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is the red circle above the square?", [(CIRCLE, RED), (SQUARE, -1)]),
        ("How many blue objects are there?", [(ns.ANY, BLUE)]),
        ("How many squares are there?", [(SQUARE, -1)]),
        ("红色的方形在图的哪一边？", [(SQUARE, RED)]),
        ("图中蓝色的物体是什么？", [(ns.ANY, BLUE)]),
        ("What is written in the image?", []),
    ],
)
def test_nouns_are_found_with_their_colours(text: str, expected: list[tuple[int, int]]) -> None:
    """Nouns are found in English and Chinese, in the singular and the plural."""
    spots = ns.find_spots(ns.Words.read(MODEL), packed(text, "yes"))
    assert list(zip(spots.shape.tolist(), spots.colour.tolist(), strict=True)) == expected
    assert spots.count.sum() == len(expected)


@pytest.mark.parametrize(("options", "answer", "right"), [("circle square", "B", 1), ("1 4 3", "C", 2)])
def test_options_are_told_right_from_wrong(options: str, answer: str, right: int) -> None:
    """The right option is marked, and nouns in options do not count as things that the question asks about."""
    lines = "\n".join(f"{letter}. {word}" for letter, word in zip("ABC", options.split(), strict=False))
    spots = ns.find_spots(ns.Words.read(MODEL), packed(f"What is the red object?\n{lines}", answer))
    assert spots.right.tolist() == [i == right for i in range(len(options.split()))]
    assert spots.shape.tolist() == [ns.ANY]


def test_the_answer_starts_after_the_prompt() -> None:
    """The position found is that of the token which predicts the first word of the answer."""
    batch = packed("Is the circle red?", "yes")
    spots = ns.find_spots(ns.Words.read(MODEL), batch)
    model = tk.load(MODEL)
    assert [model.decode([int(batch.labels[r, c])]) for r, c in spots.ask] == ["yes"]


def test_truth_of_a_noun() -> None:
    """The facts about a noun are the number of matches, the place of a single match, and what all matches share."""
    scene = table((CIRCLE, RED, 0, 0, -0.5, 0.25), (SQUARE, RED, 0, 0, 0.1, 0.2), (SQUARE, BLUE, 0, 0, 0.3, 0.4))
    words = ns.Words.read(MODEL)

    def truth(text: str) -> ns.Truth:
        return ns.look_up(ns.find_spots(words, packed(text, "yes")), scene)

    circle = truth("What color is the circle?")
    assert circle.place.tolist() == [[-0.5, 0.25]]
    assert {k: v.item() for k, v in circle.shared.items()} == {"number": 1, "shape": -1, "colour": RED, "mark": -1}
    assert {k: v.item() for k, v in truth("How many squares?").shared.items()}["number"] == 2
    assert truth("How many squares?").shared["colour"].item() == -1
    assert truth("What is the blue object?").shared["shape"].item() == SQUARE
    assert not truth("Is there a star?").match.any()


def test_losses_are_finite_and_reach_the_states() -> None:
    """The loss is finite and has gradients also for a question without options or a pair of things."""
    head, batch = ns.Nouns(16), packed("Is the circle red?", "yes")
    half, late = (torch.randn(1, 120, 16, requires_grad=True) for _ in range(2))
    scene = table((CIRCLE, RED, 0, 0, -0.5, 0.25))
    loss, figures = head(ns.Words.read(MODEL), half, late, batch, scene)
    loss.backward()
    assert torch.isfinite(loss) and half.grad.abs().sum() > 0 and late.grad.abs().sum() > 0
    assert 0 <= figures["there"] <= 1
