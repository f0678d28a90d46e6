"""Keep what the vision tower made of each picture, so that a run encodes it once."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from ..runtime.compat import BaseModelOutputWithPooling
from ..runtime.request import VISION, Merging, Vision
from ..runtime.rows import Tap, vision_rows
from ..runtime.tower import Tower, variant_of
from .base import Family, restore, tower_of

KEYS: ContextVar[list[Hashable] | None] = ContextVar("llava_prune_keys", default=None)


BLANK = object()
"""Key of the picture that stands in for none."""
LIMIT = 4 << 30
"""Bytes of features a memo holds; LLaVA-1.5 in half precision takes about 2.5 MB a picture."""


@dataclass(frozen=True)
class Picture:
    """What the tower made of one picture.

    Attributes:
        features: (T or 1 + T, Dv).
        taps: rows by block.
        cls: (Dv,) the class token's feature, or None.
        size, groups: see `Merging`; None where the tower was left alone.
    """

    features: Tensor
    taps: dict[int, Tap]
    cls: Tensor | None
    size: Tensor | None = None
    groups: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        parts = [p for t in self.taps.values() for p in t.parts()]
        return [t for t in (self.features, self.cls, self.size, self.groups, *parts) if t is not None]

    def clone(self) -> Picture:
        def own(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.clone()

        taps = {b: Tap(*(p.clone() for p in t.parts())) for b, t in self.taps.items()}
        return Picture(self.features.clone(), taps, own(self.cls), own(self.size), own(self.groups))


class Memo:
    """What the tower made of pictures. When it is full, further pictures are encoded every time.

    A method that merges inside the tower makes another tower of it, whose features are kept apart.

    Attributes:
        passes: pictures the tower really encoded.
        hits: pictures answered from memory.
        size: bytes held.
    """

    def __init__(self, rows: dict[int, list[int]], layer: int | None, tower: Tower, limit: int = LIMIT) -> None:
        self.rows = rows
        self.limit = limit
        self.size = 0
        self.layer = layer  # transformers: index into hidden_states; llava: None, the tower returns features
        self.tower = tower
        self.table: dict[tuple[Hashable, Hashable], Picture] = {}
        self.passes = 0
        self.hits = 0

    def holds(self, key: Hashable, method: Method | None = None) -> bool:
        """Whether a picture needs no pixels any more when `method` (None: one that leaves the tower alone) runs."""
        return (None if method is None else variant_of(method, self.tower), key) in self.table

    def add(self, key: tuple[Hashable, Hashable], found: Picture) -> None:
        """Keep a picture, if it fits."""
        size = sum(t.numel() * t.element_size() for t in found.tensors())
        if self.size + size <= self.limit:
            self.table[key] = found.clone()
            self.size += size


@contextmanager
def remembering(model: Any, family: Family, methods: list[Any], limit: int = LIMIT) -> Iterator[Memo]:
    """Answer tower calls from memory for pictures whose key (see `Loaded.generate`) was seen in this block.

    Args:
        methods: every method of the block; the rows they want are recorded on the first pass.
        limit: bytes to hold at most.

    Raises:
        ValueError: for features made of several tower layers.
    """
    tower, about = family.tower(model), tower_of(family, model)
    rows: dict[int, list[int]] = {}
    for method in methods:
        for block, wanted in method.vision_rows(about.feature_layer).items():
            if rows.setdefault(block, wanted) != wanted:
                raise ValueError(f"methods want different rows of tower block {block}; run them one by one")
    rows = {b: r for b, r in rows.items() if b < about.depth}
    layer = None if family.name == "llava" else model.config.vision_feature_layer
    memo = Memo(rows, layer, about, limit)
    before = tower.__dict__.get("forward")
    stock = before or type(tower).forward.__get__(tower)
    caught: dict[Any, Any] = {}

    def catch(block: int, module: Any, args: Any, kwargs: Any) -> None:
        vision = VISION.get()
        if vision is None or vision.variant is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            caught[block] = vision_rows(module, hidden.detach(), rows[block])

    def catch_class(module: Any, args: Any, output: Any) -> None:
        caught["cls"] = (output[0] if isinstance(output, tuple) else output)[:, 0].detach()

    blocks = family.blocks(model)
    hooks = [blocks[b].register_forward_pre_hook(functools.partial(catch, b), with_kwargs=True) for b in rows]
    hooks.append(blocks[about.feature_layer].register_forward_hook(catch_class))
    tower.forward = functools.partial(_forward, memo, stock, caught)
    try:
        yield memo
    finally:
        for hook in hooks:
            hook.remove()
        restore(tower, "forward", before)


def _forward(memo: Memo, stock: Any, caught: dict[Any, Any], pixels: Any = None, *args: Any, **kwargs: Any) -> Any:
    pixels = kwargs.pop("pixel_values", pixels)
    keys = KEYS.get()
    if keys is None or isinstance(pixels, (list, tuple)) or len(keys) != pixels.shape[0]:
        return stock(pixels, *args, **kwargs)
    vision = VISION.get()
    variant = None if vision is None else vision.variant
    names = [(variant, k) for k in keys]
    new = list(dict.fromkeys(k for k in names if k not in memo.table))
    fresh: dict[Hashable, Picture] = {}
    if new:
        caught.clear()
        out = stock(pixels[[names.index(k) for k in new]], *args, **kwargs)
        features = out if memo.layer is None else out.hidden_states[memo.layer]
        merging = vision.merging[-1] if vision is not None and vision.merging else None
        for i, name in enumerate(new):
            taps = {b: Tap(*(p[i] for p in t.parts())) for b, t in caught.items() if b != "cls"}
            found = Picture(features[i], taps, caught["cls"][i])
            if merging is not None:
                found = replace(found, size=merging.size[i], groups=merging.groups[i])
            fresh[name] = found
            memo.add(name, found)
    memo.passes += len(new)
    memo.hits += len(keys) - len(new)
    return _answer(memo, [memo.table.get(k) or fresh[k] for k in names], vision)


def _answer(memo: Memo, found: list[Picture], vision: Vision | None) -> Any:
    """The tower's output for remembered pictures, and what the hooks would have left."""
    features = torch.stack([f.features for f in found])
    if vision is not None:
        vision.taps = {b: Tap.joined([f.taps[b] for f in found], torch.stack) for b in found[0].taps}
        vision.cls = torch.stack([f.cls for f in found if f.cls is not None])
        sizes = [f.size for f in found if f.size is not None]
        groups = [f.groups for f in found if f.groups is not None]
        vision.merging = [Merging(torch.stack(sizes), torch.stack(groups), True)] if sizes else []
    if memo.layer is None:
        return features
    return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states={memo.layer: features})
