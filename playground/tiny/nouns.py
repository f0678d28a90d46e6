"""Auxiliary supervision of hidden states: facts that the words of a question should encode on the way to the answer.

From the answer alone, the model learns questions about two things, numbers or letters only slowly: nothing tells it to
look up each thing or to check each option. Linear probes of the hidden states supervise these intermediate steps; they
are not part of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny import suite as su
from playground.tiny import tokenizer as tk
from playground.tiny.bank import Packed

ANY = len(sc.SHAPES)  # "object": a thing of any shape
MOST = 5  # larger numbers count as this one
MARKED = [sc.SHAPES.index("sign"), sc.SHAPES.index("card")]
PARTS = {
    "place": 2, "there": 1, "number": MOST + 1, "shape": len(sc.SHAPES), "colour": len(sc.COLOURS),
    "mark": len(sc.MARKS),
}  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Meaning of every piece of the vocabulary, as arrays indexed by token id; -1 for a piece without the meaning."""

    noun: np.ndarray  # shape of a noun, ANY for "object"
    colour: np.ndarray
    letter: np.ndarray  # of an option
    dot: int
    space: int

    @classmethod
    def read(cls, folder: Path) -> Words:
        """Read the vocabulary of the tokenizer in ``folder``; a Chinese piece may contain a noun and a colour."""
        model = tk.load(folder)
        pieces = [model.id_to_piece(i).lstrip("▁") for i in range(model.get_piece_size())]
        nouns = {"object": ANY, "objects": ANY, "物体": ANY}
        for index, shape in enumerate(sc.SHAPES):
            nouns |= {shape: index, qs.plural(shape): index, su.SHAPES_CN[shape]: index}
        colours = {name: i for i, name in enumerate(sc.COLOUR_NAMES)}
        colours |= {su.COLOURS_CN[name][:1]: i for i, name in enumerate(sc.COLOUR_NAMES)}

        def meaning(piece: str, words: dict[str, int]) -> int:
            inside = (i for w, i in words.items() if not w.isascii() and w in piece)
            return words.get(piece, next(inside, -1))

        return cls(
            np.array([meaning(p, nouns) for p in pieces]),
            np.array([meaning(p, colours) for p in pieces]),
            np.array(["ABCDE".find(p) if len(p) == 1 else -1 for p in pieces]),
            model.piece_to_id("."),
            model.piece_to_id("▁"),
        )


def before(ids: np.ndarray, by: int) -> np.ndarray:
    """Return (B, L) ids of the tokens ``by`` positions earlier; 0 at the start."""
    return np.concatenate([np.zeros_like(ids[:, :by]), ids[:, :-by]], 1)


@dataclass
class Spots:
    """Positions of interest in a packed batch.

    Attributes:
        noun: (M, 2) row and column of every noun outside of options.
        shape, colour: (M,) shape and colour that the noun states; -1 for none.
        option: (K, 2) row and column at which an option has been read.
        right: (K,) whether the option is the answer.
        ask: (Q, 2) row and column at which the answer of each question with nouns begins.
        first, count: (Q,) first noun and number of nouns of the question.
    """

    noun: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    option: np.ndarray
    right: np.ndarray
    ask: np.ndarray
    first: np.ndarray
    count: np.ndarray


def find_spots(words: Words, batch: Packed) -> Spots:
    """Find the nouns, options and answers of packed questions."""
    ids, blocks, labels = batch.ids.numpy(), batch.blocks.numpy(), batch.labels.numpy()
    back = [ids, *(before(ids, k) for k in (1, 2, 3))]
    digit = (back[1] == words.space) & (back[2] == words.dot)
    letter = np.where(digit, words.letter[back[3]], words.letter[back[2]])
    option = (digit | ((back[1] == words.dot) & (ids != words.space))) & (letter >= 0) & (blocks >= 0)
    key = np.arange(len(ids))[:, None] * 1000 + blocks
    begin = np.argwhere((labels >= 0) & (before(labels, 1) <= 0))  # the first label of every block
    begin_key = key[begin[:, 0], begin[:, 1]]
    where = np.argwhere(option)
    asked = begin[np.searchsorted(begin_key, key[option])]
    right = letter[option] == words.letter[labels[asked[:, 0], asked[:, 1]]]
    noun = (words.noun[ids] >= 0) & ~option & (labels < 0) & (blocks >= 0) & ~batch.alone.numpy()
    spots = np.argwhere(noun)
    colour = np.maximum(words.colour[ids], words.colour[back[1]])  # in the same piece or in the one before
    keys, first, count = np.unique(key[noun], return_index=True, return_counts=True)
    ask = begin[np.searchsorted(begin_key, keys)]
    return Spots(spots, words.noun[ids][noun], colour[noun], where, right, ask, first, count)


@dataclass
class Truth:
    """The image content for every noun: the things that it refers to, and the values that they share (-1 for none)."""

    match: torch.Tensor  # (M, 8) bool
    place: torch.Tensor  # (M, 2) of the only thing meant
    shared: dict[str, torch.Tensor]


def look_up(spots: Spots, tables: np.ndarray) -> Truth:
    """Find the things in the scenes' ``tables`` (B, 8, 6) that the nouns refer to."""
    rows = torch.from_numpy(tables[spots.noun[:, 0]])  # (M, 8, 6)
    shape, colour = (torch.from_numpy(a)[:, None] for a in (spots.shape, spots.colour))
    match = (rows[..., 0] >= 0) & ((rows[..., 0] == shape) | (shape == ANY)) & ((colour < 0) | (rows[..., 1] == colour))
    one = rows.gather(1, match.int().argmax(1)[:, None, None].expand(-1, 1, 6))[:, 0]
    shared = {"number": match.sum(1).clamp(max=MOST)}
    for column, name in ((0, "shape"), (1, "colour"), (3, "mark")):
        same = ((rows[..., column] == one[:, None, column]) | ~match).all(1) & match.any(1)
        shared[name] = torch.where(same, one[:, column], -1.0).long()
    marked = torch.isin(one[:, 0], torch.tensor(MARKED, dtype=one.dtype))
    shared["mark"] = torch.where(marked, shared["mark"], -1)
    shared["shape"] = torch.where(shape[:, 0] == ANY, shared["shape"], -1)
    shared["colour"] = torch.where(colour[:, 0] < 0, shared["colour"], -1)
    return Truth(match, one[:, 4:6], shared)


class Nouns(nn.Module):
    """The probes, on hidden states of width ``width``."""

    def __init__(self, width: int):
        super().__init__()
        self.noun = nn.Linear(width, sum(PARTS.values()))
        self.pair = nn.Linear(width, 4 + 2 * PARTS["colour"])
        self.total = nn.Linear(width, PARTS["number"])
        self.option = nn.Linear(width, 1)

    def forward(
        self, words: Words, half: torch.Tensor, late: torch.Tensor, batch: Packed, tables: np.ndarray
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return loss and metrics.

        ``half`` and ``late`` (B, L, D) are the hidden states after half and three quarters of the layers.
        """
        spots = find_spots(words, batch)
        truth = look_up(spots, tables)
        device = half.device
        one, found = truth.match.sum(1) == 1, truth.match.any(1).float()
        out = dict(
            zip(PARTS, self.noun(at(half, spots.noun)).float().cpu().split(list(PARTS.values()), -1), strict=True)
        )
        loss = distance(out["place"][one], 2 * truth.place[one])
        figures = {"far": loss.item(), "there": sign_right(out["there"][:, 0], found)}
        loss = loss + 0.5 * presence(out["there"][:, 0], found)
        for name, goal in truth.shared.items():
            loss = loss + 0.3 * cross_entropy(out[name], goal)
            figures["n_" + name] = (out[name].argmax(-1) == goal)[goal >= 0].float().mean().item()

        late_ask = at(late, spots.ask)
        two = torch.from_numpy(spots.count == 2)
        a = torch.from_numpy(spots.first)[two]
        b = a + 1
        move, there, *colours = (
            self.pair(late_ask).float().cpu()[two].split([2, 2, PARTS["colour"], PARTS["colour"]], -1)
        )
        both = one[a] & one[b]
        apart = distance(move[both], 2 * (truth.place[a] - truth.place[b])[both])
        figures["apart"] = apart.item()
        loss = loss + apart + 0.5 * presence(there, torch.stack([found[a], found[b]], -1))
        for colour, noun in zip(colours, (a, b), strict=True):
            loss = loss + 0.3 * cross_entropy(colour, truth.shared["colour"][noun])
        single = torch.from_numpy(spots.count == 1)
        number = truth.shared["number"][torch.from_numpy(spots.first)[single]]
        total = self.total(late_ask).float().cpu()[single]
        loss = loss + 0.5 * cross_entropy(total, number)
        figures["total"] = (total.argmax(-1) == number)[number > 1].float().mean().item()
        said, right = self.option(at(late, spots.option))[:, 0].float().cpu(), torch.from_numpy(spots.right).float()
        figures["option"] = sign_right(said, right)
        return (loss + presence(said, right)).to(device), figures


def at(states: torch.Tensor, spots: np.ndarray) -> torch.Tensor:
    """Return the (M, D) states at rows and columns (M, 2)."""
    rows, columns = torch.from_numpy(spots).to(states.device).T
    return states[rows, columns]


def distance(out: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the mean Huber loss; 0 for an empty input."""
    return F.smooth_l1_loss(out, goal, reduction="sum") / max(1, goal.numel())


def presence(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the mean binary cross entropy; 0 for an empty input."""
    return F.binary_cross_entropy_with_logits(logits, goal, reduction="sum") / max(1, goal.numel())


def cross_entropy(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy over the goals that are not -1; 0 if there are none."""
    return F.cross_entropy(logits, goal, ignore_index=-1, reduction="sum") / (goal >= 0).sum().clamp(min=1)


def sign_right(logits: torch.Tensor, goal: torch.Tensor) -> float:
    """Return the share of logits whose sign matches their goal."""
    return ((logits > 0) == (goal > 0)).float().mean().item()
