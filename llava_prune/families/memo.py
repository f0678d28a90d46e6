"""Keep what the vision tower made of each picture, so that a run encodes it once."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..runtime.compat import BaseModelOutputWithPooling
from ..runtime.request import VISION
from ..runtime.rows import vision_rows
from .base import Family, restore

KEYS: ContextVar[list[Hashable] | None] = ContextVar("llava_prune_keys", default=None)


BLANK = object()
"""Key of the picture that stands in for none."""
LIMIT = 4 << 30
"""Bytes of features a memo holds; LLaVA-1.5 in half precision takes about 2.5 MB a picture."""


class Memo:
    """Features and tapped rows by picture. When it is full, further pictures are encoded every time.

    Attributes:
        passes: pictures the tower really encoded.
        hits: pictures answered from memory.
        size: bytes held.
    """

    def __init__(self, rows: dict[int, list[int]], layer: int | None, limit: int = LIMIT) -> None:
        self.rows = rows
        self.limit = limit
        self.size = 0
        self.layer = layer  # transformers: index into hidden_states; llava: None, the tower returns features
        self.table: dict[Hashable, tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]] = {}
        self.passes = 0
        self.hits = 0

    def holds(self, key: Hashable) -> bool:
        """Whether a picture needs no pixels any more."""
        return key in self.table

    def add(self, key: Hashable, *found: Any) -> None:
        """Keep features, rows and keys of a picture, if they fit."""
        features, probs, keys = found
        tensors = [features, *probs.values(), *keys.values()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self.size + size <= self.limit:
            self.table[key] = (
                features.clone(),
                {b: p.clone() for b, p in probs.items()},
                {b: k.clone() for b, k in keys.items()},
            )
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
    tower = family.tower(model)
    rows: dict[int, list[int]] = {}
    for method in methods:
        for block, wanted in method.vision_rows(family.feature_layer(model)).items():
            if rows.setdefault(block, wanted) != wanted:
                raise ValueError(f"methods want different rows of tower block {block}; run them one by one")
    layer = None if family.name == "llava" else model.config.vision_feature_layer
    memo = Memo(rows, layer, limit)
    before = tower.__dict__.get("forward")
    stock = before or type(tower).forward.__get__(tower)
    caught: dict[int, tuple[Tensor, Tensor]] = {}

    def catch(block: int, module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        caught[block] = vision_rows(module, hidden.detach(), rows[block])

    hooks = [
        family.blocks(model)[b].register_forward_pre_hook(functools.partial(catch, b), with_kwargs=True) for b in rows
    ]
    tower.forward = functools.partial(_forward, memo, stock, caught)
    try:
        yield memo
    finally:
        for hook in hooks:
            hook.remove()
        restore(tower, "forward", before)


def _forward(memo: Memo, stock: Any, caught: dict[int, Any], pixels: Any = None, *args: Any, **kwargs: Any) -> Any:
    pixels = kwargs.pop("pixel_values", pixels)
    keys = KEYS.get()
    if keys is None or isinstance(pixels, (list, tuple)) or len(keys) != pixels.shape[0]:
        return stock(pixels, *args, **kwargs)
    new = list(dict.fromkeys(k for k in keys if not memo.holds(k)))
    fresh: dict[Hashable, Any] = {}
    if new:
        first = [keys.index(k) for k in new]
        caught.clear()
        out = stock(pixels[first], *args, **kwargs)
        features = out if memo.layer is None else out.hidden_states[memo.layer]
        for i, key in enumerate(new):
            probs = {b: p[i] for b, (p, _) in caught.items()}
            fresh[key] = (features[i], probs, {b: k[i] for b, (_, k) in caught.items()})
            memo.add(key, *fresh[key])
    memo.passes += len(new)
    memo.hits += len(keys) - len(new)
    found = [memo.table[k] if memo.holds(k) else fresh[k] for k in keys]
    features = torch.stack([f for f, _, _ in found])
    vision = VISION.get()
    if vision is not None:
        vision.probs = {b: torch.stack([p[b] for _, p, _ in found]) for b in memo.rows}
        vision.keys = {b: torch.stack([k[b] for _, _, k in found]) for b in memo.rows}
    if memo.layer is None:
        return features
    return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states={memo.layer: features})
