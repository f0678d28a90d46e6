"""haotian-liu/LLaVA's own classes (package `llava`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.select import sent
from ..runtime.request import PENDING, SIZES, VISION, Pending, Vision, refuse_picture, request_of
from .base import block_index, encoder_blocks, restore

IMAGE = -200
"""The placeholder id of a picture in the package's prompts."""
IGNORE = -100
"""The package's label of a row that is no text."""


class Llava:
    """Family of `llava.model.LlavaLlamaForCausalLM`."""

    name = "llava"

    def matches(self, model: Any) -> bool:
        inner = getattr(model, "model", None)
        return hasattr(model, "prepare_inputs_labels_for_multimodal") and hasattr(inner, "mm_projector")

    def language_model(self, model: Any) -> Any:
        return model.model

    def tower(self, model: Any) -> Any:
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            raise ValueError("the vision tower is not loaded; call model.get_vision_tower().load_model() first")
        return tower

    def blocks(self, model: Any) -> nn.ModuleList:
        return encoder_blocks(self.tower(model).vision_tower)

    def projector(self, model: Any) -> nn.Module:
        return model.model.mm_projector

    def feature_layer(self, model: Any) -> int:
        return block_index(model.get_vision_tower().select_layer, len(self.blocks(model)))

    def grid(self, model: Any) -> tuple[int, int]:
        side = self.tower(model).num_patches_per_side
        return side, side

    def max_visual(self, model: Any) -> int:
        rows, columns = self.grid(model)
        points = getattr(model.config, "image_grid_pinpoints", None)
        if getattr(model.config, "image_aspect_ratio", None) != "anyres" or not isinstance(points, (list, tuple)):
            return rows * columns
        size = self.tower(model).config.image_size
        return self.crops(model) * rows * columns + max(h // size for _, h in points) * rows

    def crops(self, model: Any) -> int:
        points = getattr(model.config, "image_grid_pinpoints", None)
        if getattr(model.config, "image_aspect_ratio", None) != "anyres" or not isinstance(points, (list, tuple)):
            return 1
        size = self.tower(model).config.image_size
        return max((w // size) * (h // size) + 1 for w, h in points)

    def pads(self, model: Any) -> bool:
        return getattr(model.config, "image_aspect_ratio", None) == "pad"

    def mark(self, model: Any) -> list[Callable[[], None]]:
        undo = []
        for name, wrapper in (("prepare_inputs_labels_for_multimodal", _splice), ("generate", _generate)):
            before = model.__dict__.get(name)
            setattr(model, name, functools.partial(wrapper, model, before))
            undo.append(functools.partial(restore, model, name, before))
        return undo


def _generate(model: Any, before: Any, *args: Any, **kwargs: Any) -> Any:
    """Forget pictures of a call that failed between splice and prefill."""
    PENDING.set(None)
    VISION.set(None)
    return (before or type(model).generate.__get__(model))(*args, **kwargs)


def _splice(
    model: Any,
    before: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    images: Any,
    image_sizes: Any = None,
) -> tuple[Any, ...]:
    """The package's splice, run once with labels and mask of ours so that it says where the pictures went."""
    stock = before or type(model).prepare_inputs_labels_for_multimodal.__get__(model)
    if request_of(past_key_values) is not None:
        if input_ids.shape[1] > 1:
            PENDING.set(None)  # of a prefill that failed on the way
            if images is not None:
                refuse_picture(past_key_values.get_seq_length())
        return stock(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
    PENDING.set(None)
    if images is None or input_ids.shape[1] == 1:
        return stock(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
    ones = torch.ones_like(input_ids, dtype=torch.bool)
    mask = ones if attention_mask is None else attention_mask
    marked = torch.zeros_like(input_ids) if labels is None else labels.clamp(min=0)
    sizes = None if image_sizes is None else [(int(w), int(h)) for w, h in image_sizes]
    token = SIZES.set(sizes if sizes is not None else SIZES.get())
    try:
        out = stock(input_ids, position_ids, mask, past_key_values, marked, images, image_sizes)
    finally:
        SIZES.reset(token)
    visual = (out[5] == IGNORE) & out[2].bool()
    vision = VISION.get() or Vision()
    source = _source(model, stock, input_ids, mask, images, image_sizes, visual) if _needed(vision) else None
    if vision.cut is not None:
        vision.cut.pictures = _layouts(model, images, image_sizes)
    PENDING.set(Pending(visual, source, vision.carry, vision.cut))
    new_labels = None
    if labels is not None:  # the caller's own labels, with theirs of ignored text
        new_labels = stock(input_ids, position_ids, mask, past_key_values, labels, images, image_sizes)[5]
    return (*out[:2], None if attention_mask is None else out[2], out[3], out[4], new_labels)


def _needed(vision: Vision) -> bool:
    return bool(vision.carry) or vision.cut is not None


def _layouts(model: Any, images: Any, image_sizes: Any) -> list[tuple[int, int, int]]:
    """(crops, rows of crops, columns of crops) of each picture; see `Rows.pictures`."""
    from llava.mm_utils import get_anyres_image_grid_shape

    if not (isinstance(images, (list, tuple)) or images.ndim == 5):
        return [(1, 0, 0)] * images.shape[0]
    crops = [x.shape[0] if x.ndim == 4 else 1 for x in images]
    if getattr(model.config, "image_aspect_ratio", None) != "anyres" or image_sizes is None:
        return [(n, 0, 0) for n in crops]
    out = []
    for n, size in zip(crops, image_sizes, strict=True):
        side = model.get_vision_tower().config.image_size
        columns, rows = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side)
        out.append((n, rows, columns) if n > 1 and rows * columns == n - 1 else (n, 0, 0))
    return out


def _source(
    model: Any, stock: Any, input_ids: Tensor, mask: Tensor, images: Any, image_sizes: Any, visual: Tensor
) -> Tensor:
    """(B, L) long: which patch is behind each visual token, counted over all pictures; -1 for newline tokens.

    The package's own merging decides: with crops (anyres) its splice runs once more on patch numbers in place of
    features. A newline vector is told by its channels, which are not all the same number.
    """
    listed = isinstance(images, (list, tuple)) or images.ndim == 5
    patches = model.get_vision_tower().num_patches
    if not listed or getattr(model.config, "mm_patch_merge_type", "flat") == "flat":
        named = ((input_ids == IMAGE) & mask.bool()).sum(1)
        used = named.clamp(min=1)  # a sample without picture takes an unused one, as the package does
        first = used.cumsum(0) - used  # (B,) number of each sample's first picture
        if listed:
            crops = [x.shape[0] if x.ndim == 4 else 1 for x in images]
            before = sent([sum(crops[:i]) for i in range(len(crops) + 1)], first)
            first = before[first.clamp(max=len(crops))]
        offset = (first * patches).to(visual.device)[:, None]
        return (visual.cumsum(1) - 1 + offset).masked_fill(~visual, -1)
    crops = [x.shape[0] if x.ndim == 4 else 1 for x in images]
    width = model.config.hidden_size
    numbers = torch.arange(1, sum(crops) * patches + 1, device=visual.device, dtype=torch.float32)
    table = numbers.view(-1, patches, 1).expand(-1, -1, width)
    encode = model.__dict__.get("encode_images")
    model.encode_images = lambda pictures: table
    try:
        embeds = stock(input_ids, None, mask, None, torch.zeros_like(input_ids), images, image_sizes)[4].float()
    finally:
        restore(model, "encode_images", encode)
    number = embeds[..., 0].round().long()
    real = visual & (embeds == embeds[..., :1]).all(-1) & (number >= 1)
    return (number - 1).masked_fill(~real, -1)
