"""Keep what the vision tower made of each image, so that a run encodes it once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.attention import RecordedAttention
from ..runtime.compat import BaseModelOutputWithPooling
from ..runtime.merging import Merging
from ..runtime.patching import execution_device, replace_method
from ..runtime.state import TowerPass, hinting, hints, innermost, recording, tower_pass
from ..runtime.vision import record_attention
from .base import Family, encoder_blocks

BLANK = object()
"""Key of the image that a prompt without images gets in package llava."""
LIMIT = 4 << 30
"""Bytes of features an image cache holds; LLaVA-1.5 in half precision takes about 2.5 MB an image."""


@dataclass(frozen=True)
class CachedImage:
    """What the tower made of one image.

    Attributes:
        features: (T or 1 + T, Dv).
        attention: recorded attention by block, without the image dimension.
        cls: (Dv,) the class token's feature, or None.
        size, groups: see `Merging`; None where nothing was merged.
    """

    features: Tensor
    attention: dict[int, RecordedAttention]
    cls: Tensor | None
    size: Tensor | None = None
    groups: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        parts = [t for r in self.attention.values() for t in r.tensors()]
        return [t for t in (self.features, self.cls, self.size, self.groups, *parts) if t is not None]

    def clone(self) -> CachedImage:
        """A copy that shares no memory with the batch it was computed in."""

        def own(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.clone()

        attention = {b: r.map(torch.clone) for b, r in self.attention.items()}
        return CachedImage(self.features.clone(), attention, own(self.cls), own(self.size), own(self.groups))


def crop_keys(images: Any, keys: Sequence[Hashable] | None) -> list[Hashable] | None:
    """Identities of what the vision tower encodes: images, or the crops of a list of images one after the other."""
    if keys is None or not isinstance(images, list):
        return None if keys is None else list(keys)
    return [(key, i) for key, crops in zip(keys, images, strict=True) for i in range(len(crops))]


class ImageCache:
    """What the tower made of images. When it is full, further images are encoded every time. Safe for threads.

    A method that merges inside the tower makes another tower of it, whose features are kept apart.

    Attributes:
        passes: images the tower really encoded.
        hits: images answered from memory.
        size: bytes held.
    """

    def __init__(self, queries: dict[int, list[int]], layer: int | None, tower: Any, limit: int = LIMIT) -> None:
        self.queries = queries
        self.limit = limit
        self.size = 0
        self.layer = layer  # transformers: index into hidden_states; llava: None, the tower returns features
        self._tower = tower
        self.table: dict[tuple[Hashable, Hashable], CachedImage] = {}
        self.passes = 0
        self.hits = 0
        self._lock = threading.Lock()

    def encode(self, keys: Sequence[Hashable], pixels: Tensor | list[Tensor]) -> None:
        """Run the tower on images that are not known, ahead of the requests that will need them.

        Args:
            keys: N image identities.
            pixels: (N, 3, H, W), or N tensors (crops, 3, H, W).
        """
        dtype = next(self._tower.parameters()).dtype
        extra = {} if self.layer is None else {"output_hidden_states": True}
        images = torch.cat(pixels) if isinstance(pixels, list) else pixels
        with torch.inference_mode(), hinting(image_keys=crop_keys(pixels, keys)):
            self._tower(images.to(execution_device(self._tower, images.device), dtype), **extra)

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self.table.clear()
            self.size = 0

    def add(self, fresh: dict[tuple[Hashable, Hashable], CachedImage], asked: int) -> None:
        """Keep new images, if they fit, and count those that were `asked` for."""
        copies = {name: found.clone() for name, found in fresh.items()}
        with self._lock:
            self.passes += len(fresh)
            self.hits += asked - len(fresh)
            for name, found in copies.items():
                size = sum(t.numel() * t.element_size() for t in found.tensors())
                if name not in self.table and self.size + size <= self.limit:
                    self.table[name] = found
                    self.size += size


@contextmanager
def cached_images(model: Any, family: Family, methods: list[Any], limit: int = LIMIT) -> Iterator[ImageCache]:
    """Answer tower calls from memory for images whose key (see `Loaded.generate`) was seen in this block.

    Args:
        methods: every method of the block; the attention they need is recorded on the first pass.
        limit: bytes to hold at most.

    Raises:
        ValueError: for features made of several tower layers, or methods that need different query positions.
    """
    facts = family.tower_facts(model)
    if facts.feature_layer < 0:
        raise ValueError("images are cached for features of a single vision layer; leave remember_images out")
    queries: dict[int, list[int]] = {}
    for method in methods:
        for block, wanted in method.vision_queries(facts.feature_layer).items():
            if queries.setdefault(block, wanted) != wanted:
                raise ValueError(f"methods need different query positions of tower block {block}; run them one by one")
    queries = {b: r for b, r in queries.items() if b < facts.depth}
    layer = None if family.name == "llava" else model.config.vision_feature_layer
    cache = ImageCache(queries, layer, family.tower(model), limit)
    undo = record_attention(encoder_blocks(family.encoder(model)), queries, facts.feature_layer)
    undo.append(replace_method(family.tower(model), "forward", _forward, cache, model))
    try:
        yield cache
    finally:
        for step in reversed(undo):
            step.remove()


def _forward(cache: ImageCache, model: Any, stock: Any, pixels: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The tower's forward: images that are not known are encoded, all are answered from the cache."""
    pixels = kwargs.pop("pixel_values", pixels)
    keys = hints().take_keys()
    if keys is None or isinstance(pixels, (list, tuple)) or len(keys) != pixels.shape[0]:
        return stock(pixels, *args, **kwargs)
    request = innermost()
    mine = request is not None and request.handle.model is model
    asked = tower_pass() if mine else None  # what an attached method wants of this pass
    variant = request.handle.vision.variant if request is not None and asked is not None else None
    names = [(variant, k) for k in keys]
    known = {name: cache.table[name] for name in names if name in cache.table}
    new = list(dict.fromkeys(name for name in names if name not in known))
    fresh: dict[tuple[Hashable, Hashable], CachedImage] = {}
    if new:
        with recording(TowerPass({} if variant else cache.queries, merges=variant is not None)) as found:
            out = stock(pixels[[names.index(k) for k in new]], *args, **kwargs)
        features = out if cache.layer is None else out.hidden_states[cache.layer]
        for i, name in enumerate(new):
            fresh[name] = _image(found, features, i)
    cache.add(fresh, len(keys))
    return _answer(cache, [known.get(name) or fresh[name] for name in names], asked)


def _image(found: TowerPass, features: Tensor, i: int) -> CachedImage:
    """Image i of a pass of the tower."""
    attention = {b: r.map(lambda t: t[i]) for b, r in found.attention.items()}
    cls = None if found.cls is None else found.cls[i]
    if found.merging is None:
        return CachedImage(features[i], attention, cls)
    return CachedImage(features[i], attention, cls, found.merging.size[i], found.merging.groups[i])


def _answer(cache: ImageCache, images: list[CachedImage], asked: TowerPass | None) -> Any:
    """The tower's output for known images, and what the hooks would have recorded."""
    features = torch.stack([f.features for f in images])
    if asked is not None:
        for block in images[0].attention:
            asked.attention[block] = RecordedAttention.joined([f.attention[block] for f in images], torch.stack)
        classes = [f.cls for f in images if f.cls is not None]
        asked.cls = torch.stack(classes) if len(classes) == len(images) else None
        sizes = [f.size for f in images if f.size is not None]
        groups = [f.groups for f in images if f.groups is not None]
        asked.merging = Merging(torch.stack(sizes), torch.stack(groups), True) if sizes else None
    if cache.layer is None:
        return features
    states: Any = {cache.layer: features}  # looked up by the feature layer, which may be negative
    return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=states)
