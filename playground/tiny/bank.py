"""Tokenise questions about the training scenes, and pack them into batches that share a prefix."""

from __future__ import annotations

import multiprocessing as mp
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from playground.tiny import questions as qs
from playground.tiny import scenes as sc
from playground.tiny import suite as su
from playground.tiny import tokenizer as tk

TYPES = (*qs.GENERATORS, *su.MAKERS)
SHORT = {"existAnd": "logical", "existOr": "logical", "wordQuery": "markQuery", "numberQuery": "markQuery"}
_STATE: dict[str, object] = {}


@dataclass(frozen=True)
class Item:
    """One tokenised question.

    Attributes:
        full: ids with the instruction line.
        short: ids without the instruction line.
        answer: ids of the answer, ending in </s>.
        kind: index of the question's type in ``TYPES``.
        alone: whether the prompt has no image; its ids then directly follow the system text.
    """

    full: tuple[int, ...]
    short: tuple[int, ...]
    answer: tuple[int, ...]
    kind: int
    alone: bool = False


def _begin(folder: Path, numbers: tuple[int, int]) -> None:
    _STATE.update(model=tk.load(folder), numbers=numbers)


def _items(seed: int) -> list[Item]:
    """Return the questions of one scene: GQA's kinds, then those of the other benchmarks."""
    model, rng = _STATE["model"], np.random.default_rng([20_17, seed])
    scene, (number, others) = sc.make_scene(seed), _STATE["numbers"]
    result = []
    for q in qs.ask(scene, rng, number):
        text = q.text
        if q.answer in ("yes", "no") and rng.random() < 0.1:
            text += " Please answer yes or no."
        full, short = model.encode(f"\n{text}\n{q.suffix} ASSISTANT:"), model.encode(f"\n{text} ASSISTANT:")
        kind = TYPES.index(SHORT.get(q.detailed, q.detailed))
        result.append(Item(tuple(full), tuple(short), (*model.encode(q.answer), model.eos_id()), kind))
    for name, case in su.ask(scene, rng, others):
        answer = (*model.encode(case.answer), model.eos_id())
        texts = (case.prompt, case.body)
        if case.image:
            full, short = (tuple(model.encode(f"\n{text} ASSISTANT:")) for text in texts)
        else:
            full, short = (tuple(tk.after_system(model, text)) for text in texts)
        result.append(Item(full, short, answer, TYPES.index(name), not case.image))
    return result


def build(folder: Path, first: int, count: int, numbers: tuple[int, int], workers: int) -> list[list[Item]]:
    """Build ``numbers`` questions (GQA's, others) for each of ``count`` scenes."""
    with mp.get_context("fork").Pool(workers, _begin, (folder, numbers)) as pool:
        return pool.map(_items, range(first, first + count), chunksize=64)


def load_or_build(folder: Path, path: Path, count: int, numbers: tuple[int, int], workers: int) -> list[list[Item]]:
    """Load :func:`build`'s result for scenes 0 to ``count`` - 1 from ``path``, building it if the file does not exist.

    The file serves resumed runs and the other processes.
    """
    if not path.exists():
        bank = build(folder, 0, count, numbers, workers)
        path.write_bytes(pickle.dumps([[(i.full, i.short, i.answer, i.kind, i.alone) for i in b] for b in bank]))
    return [[Item(*values) for values in items] for items in pickle.loads(path.read_bytes())]


@dataclass
class Packed:
    """A batch of text blocks; every tensor is (B, L).

    Attributes:
        ids: token ids.
        positions: positions within the block.
        blocks: block numbers; -1 for padding.
        labels: labels; -100 where there is none.
        kinds: type of the question at the position that predicts the last token of its answer; -1 elsewhere.
        alone: whether the block sees no image.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    alone: torch.Tensor


def pack(
    bank: list[list[Item]], index: np.ndarray, budget: int, rng: np.random.Generator, full: float, weights: np.ndarray
) -> Packed:
    """Fill ``budget`` text positions per scene with question blocks.

    Args:
        bank: questions of every scene.
        index: scenes of the batch.
        budget: number of text positions.
        rng: random generator.
        full: share of blocks with the instruction line.
        weights: relative frequency of the types.
    """
    shape = (len(index), budget)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    blocks, labels, kinds, alone = (np.full(shape, v) for v in (-1, -100, -1, 0))
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
            alone[row, span] = item.alone
            labels[row, at + len(text) - 1 : at + length] = item.answer
            kinds[row, at + length - 2] = item.kind
            at, block = at + length, block + 1
            if at > budget - 14:
                break
    arrays = (ids, positions, blocks, labels, kinds)
    return Packed(*(torch.from_numpy(a.astype(np.int64)) for a in arrays), torch.from_numpy(alone > 0))


def attention_bias(prefix: int, system: int, batch: Packed) -> torch.Tensor:
    """Return the (B, 1, L, prefix + L) additive mask of the text rows.

    A block attends to the prefix and causally to itself. Blocks without an image attend only to the first ``system``
    columns of the prefix.
    """
    blocks = batch.blocks
    b, length = blocks.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    allowed = causal & (blocks[:, None, :] == blocks[:, :, None])
    bias = torch.zeros(b, length, prefix + length, device=blocks.device)
    bias[:, :, prefix:].masked_fill_(~allowed, float("-inf"))
    bias[:, :, system:prefix].masked_fill_(batch.alone[:, :, None], float("-inf"))
    return bias[:, None]
