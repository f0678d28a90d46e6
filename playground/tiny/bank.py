"""Tokenised questions about the training scenes and their packing into shared-prefix batches."""

from __future__ import annotations

import multiprocessing as mp
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny import tokenizer as tk

TYPES = tuple(qs.GENERATORS)
SHORT = {"existAnd": "logical", "existOr": "logical", "wordQuery": "markQuery", "numberQuery": "markQuery"}
_STATE: dict[str, object] = {}


@dataclass(frozen=True)
class Item:
    """One question: ids with and without the instruction line, answer ids with </s>, index of its type."""

    full: tuple[int, ...]
    short: tuple[int, ...]
    answer: tuple[int, ...]
    kind: int


def _begin(folder: Path, number: int) -> None:
    _STATE.update(model=tk.load(folder), number=number)


def _items(seed: int) -> list[Item]:
    """The questions of one scene."""
    model, rng = _STATE["model"], np.random.default_rng([20_17, seed])
    result = []
    for q in qs.ask(sc.make_scene(seed), rng, _STATE["number"]):
        text = q.text
        if q.answer in ("yes", "no") and rng.random() < 0.1:
            text += " Please answer yes or no."
        full, short = model.encode(f"\n{text}\n{q.suffix} ASSISTANT:"), model.encode(f"\n{text} ASSISTANT:")
        kind = TYPES.index(SHORT.get(q.detailed, q.detailed))
        result.append(Item(tuple(full), tuple(short), (*model.encode(q.answer), model.eos_id()), kind))
    return result


def build(folder: Path, first: int, count: int, number: int, workers: int) -> list[list[Item]]:
    """``number`` questions for each of ``count`` scenes."""
    with mp.get_context("fork").Pool(workers, _begin, (folder, number)) as pool:
        return pool.map(_items, range(first, first + count), chunksize=64)


def load_or_build(folder: Path, path: Path, count: int, number: int, workers: int) -> list[list[Item]]:
    """:func:`build` for scenes 0 to ``count`` - 1, kept in ``path`` for a resumed run and for the other processes."""
    if not path.exists():
        bank = build(folder, 0, count, number, workers)
        path.write_bytes(pickle.dumps([[(i.full, i.short, i.answer, i.kind) for i in items] for items in bank]))
    return [[Item(*values) for values in items] for items in pickle.loads(path.read_bytes())]


@dataclass
class Packed:
    """A batch of text blocks: ids, positions after the prefix, block numbers (-1 pads), labels, types; all (B, L).

    A question's type stands where the last token of its answer is predicted, -1 elsewhere.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor


def pack(
    bank: list[list[Item]], index: np.ndarray, budget: int, rng: np.random.Generator, full: float, weights: np.ndarray
) -> Packed:
    """Fill ``budget`` text positions per scene with question blocks.

    ``full`` is the share of blocks with the instruction line, ``weights`` the relative frequency of the types.
    """
    shape = (len(index), budget)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    blocks, labels, kinds = np.full(shape, -1), np.full(shape, -100), np.full(shape, -1)
    for row, scene in enumerate(index):
        items, at, block = bank[scene], 0, 1
        keys = rng.random(len(items)) ** (1 / weights[[i.kind for i in items]])
        for item in (items[i] for i in np.argsort(-keys)):
            text = item.full if rng.random() < full else item.short
            length = len(text) + len(item.answer) - 1
            if at + length > budget:
                continue
            span = slice(at, at + length)
            ids[row, span] = (*text, *item.answer[:-1])
            positions[row, span] = np.arange(length)
            blocks[row, span] = block
            labels[row, at + len(text) - 1 : at + length] = item.answer
            kinds[row, at + length - 2] = item.kind
            at, block = at + length, block + 1
            if at > budget - 14:
                break
    return Packed(*(torch.from_numpy(a.astype(np.int64)) for a in (ids, positions, blocks, labels, kinds)))


def attention_bias(prefix: int, blocks: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, prefix + L) additive mask of the text rows: every block sees the prefix and, causally, itself."""
    b, length = blocks.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    allowed = causal & (blocks[:, None, :] == blocks[:, :, None])
    bias = torch.zeros(b, length, prefix + length, device=blocks.device)
    bias[:, :, prefix:].masked_fill_(~allowed, float("-inf"))
    return bias[:, None]
