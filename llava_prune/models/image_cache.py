"""Cache the output of the vision tower for each image, so that an evaluation encodes each image once."""

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
from ..runtime.state import TowerPass, current_request, current_tower_pass, hints, recording, with_hints
from ..runtime.vision import record_attention
from .base import Family, encoder_blocks

BLANK = object()
"""Key of the blank image that package llava needs for a prompt without images."""
LIMIT = 4 << 30
"""Default limit of an image cache in bytes; LLaVA-1.5 in half precision takes about 2.5 MB for each image."""


@dataclass(frozen=True)
class CachedImage:
    """The cached output of the tower for one image.

    Attributes:
        features: (T or 1 + T, Dv) features.
        attention: recorded attention by block, without the image dimension.
        cls: (Dv,) feature of the class token, or None.
        size, groups: see `Merging`; None if nothing was merged.
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
        """Return a copy that shares no memory with the batch in which it was computed."""

        def own(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.clone()

        attention = {b: r.map(torch.clone) for b, r in self.attention.items()}
        return CachedImage(self.features.clone(), attention, own(self.cls), own(self.size), own(self.groups))


def crop_keys(images: Any, keys: Sequence[Hashable] | None) -> list[Hashable] | None:
    """Return the keys of the images that the tower encodes; for a list of images in crops, one key for each crop."""
    if keys is None or not isinstance(images, list):
        return None if keys is None else list(keys)
    return [(key, i) for key, crops in zip(keys, images, strict=True) for i in range(len(crops))]


class ImageCache:
    """A cache of the tower's outputs by image key. Thread-safe.

    When the cache is full, further images are encoded every time. The features of a method that merges inside the tower
    are stored separately.

    Args:
        queries: block -> query positions whose attention is recorded.
        layer: index of the feature layer in `hidden_states` (transformers); None for package llava, whose tower returns
            features.
        tower: the vision tower.
        limit: largest number of bytes to hold.

    Attributes:
        passes: number of images that the tower has encoded.
        hits: number of images answered from the cache.
        size: bytes held.
    """

    def __init__(self, queries: dict[int, list[int]], layer: int | None, tower: Any, limit: int = LIMIT) -> None:
        self.queries = queries
        self.limit = limit
        self.size = 0
        self.layer = layer
        self._tower = tower
        self.table: dict[tuple[Hashable, Hashable], CachedImage] = {}
        self.passes = 0
        self.hits = 0
        self._lock = threading.Lock()

    def encode(self, keys: Sequence[Hashable], pixels: Tensor | list[Tensor]) -> None:
        """Encode images that are not in the cache, before the requests that need them.

        Args:
            keys: N image keys.
            pixels: (N, 3, H, W), or N tensors (crops, 3, H, W).
        """
        dtype = next(self._tower.parameters()).dtype
        extra = {} if self.layer is None else {"output_hidden_states": True}
        images = torch.cat(pixels) if isinstance(pixels, list) else pixels
        with torch.inference_mode(), with_hints(image_keys=crop_keys(pixels, keys)):
            self._tower(images.to(execution_device(self._tower, images.device), dtype), **extra)

    def clear(self) -> None:
        """Remove all images from the cache."""
        with self._lock:
            self.table.clear()
            self.size = 0

    def add(self, fresh: dict[tuple[Hashable, Hashable], CachedImage], asked: int) -> None:
        """Store new images if they fit, and update the counts for `asked` requested images."""
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
    """Answer tower calls from a cache for images whose key (see `Loaded.generate`) was encoded before in this block.

    Args:
        model: the model.
        family: its package.
        methods: all methods that run in the block; the attention that they need is recorded on the first pass.
        limit: largest number of bytes to hold.

    Raises:
        ValueError: for features of several tower layers, or methods that need different query positions.
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
    """Replace the tower's forward: encode images that are not cached, and return the outputs of all images."""
    pixels = kwargs.pop("pixel_values", pixels)
    keys = hints().take_keys()
    if keys is None or isinstance(pixels, (list, tuple)) or len(keys) != pixels.shape[0]:
        return stock(pixels, *args, **kwargs)
    request = current_request()
    mine = request is not None and request.handle.model is model
    asked = current_tower_pass() if mine else None  # recordings that an attached method needs from this pass
    variant = request.handle.vision.variant if request is not None and asked is not None else None
    names = [(variant, k) for k in keys]
    known = {name: image for name in names if (image := cache.table.get(name)) is not None}
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
    """Return the cache entry of image i of one pass of the tower."""
    attention = {b: r.map(lambda t: t[i]) for b, r in found.attention.items()}
    cls = None if found.cls is None else found.cls[i]
    if found.merging is None:
        return CachedImage(features[i], attention, cls)
    return CachedImage(features[i], attention, cls, found.merging.size[i], found.merging.groups[i])


def _answer(cache: ImageCache, images: list[CachedImage], asked: TowerPass | None) -> Any:
    """Return the tower's output for cached images, and fill `asked` with the recordings of the hooks."""
    features = torch.stack([f.features for f in images])
    if asked is not None:
        for block in images[0].attention:
            if asked.queries.get(block) not in (None, cache.queries[block]):
                continue  # other query positions than those that were recorded
            asked.attention[block] = RecordedAttention.joined([f.attention[block] for f in images], torch.stack)
        classes = [f.cls for f in images if f.cls is not None]
        asked.cls = torch.stack(classes) if len(classes) == len(images) else None
        sizes = [f.size for f in images if f.size is not None]
        groups = [f.groups for f in images if f.groups is not None]
        asked.merging = Merging(torch.stack(sizes), torch.stack(groups), True) if sizes else None
    if cache.layer is None:
        return features
    states: Any = {cache.layer: features}  # the package looks it up by the feature layer, which may be negative
    return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=states)
