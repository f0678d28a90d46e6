"""transformers' LlavaForConditionalGeneration and LlavaNextForConditionalGeneration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.request import PENDING, VISION, Pending, refuse_picture, request_of
from .base import block_index, encoder_blocks, restore

CLASSES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")


class HF:
    """Family of transformers' Llava and LlavaNext with a Llama language model."""

    name = "hf"

    def matches(self, model: Any) -> bool:
        named = any(c.__name__ in CLASSES for c in type(model).__mro__)
        return named and type(model.model.language_model).__name__ == "LlamaModel"

    def language_model(self, model: Any) -> Any:
        return model.model.language_model

    def tower(self, model: Any) -> Any:
        return model.model.vision_tower

    def blocks(self, model: Any) -> nn.ModuleList:
        return encoder_blocks(self.tower(model))

    def projector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def feature_layer(self, model: Any) -> int:
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer={layer!r}: methods need a single feature layer")
        return block_index(layer, len(self.blocks(model)))

    def grid(self, model: Any) -> tuple[int, int]:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def max_visual(self, model: Any) -> int:
        rows, columns = self.grid(model)
        points = getattr(model.config, "image_grid_pinpoints", None)
        if not points:
            return rows * columns
        size = model.config.vision_config.image_size
        return self.crops(model) * rows * columns + max(h // size for h, _ in points) * rows

    def crops(self, model: Any) -> int:
        points = getattr(model.config, "image_grid_pinpoints", None)
        size = model.config.vision_config.image_size
        return max((h // size) * (w // size) + 1 for h, w in points) if points else 1

    def pads(self, model: Any) -> bool:
        return not is_next(model)

    def mark(self, model: Any) -> list[Callable[[], None]]:
        inner = model.model
        undo: list[Callable[[], None]] = [inner.register_forward_pre_hook(_before, with_kwargs=True).remove]
        wrappers = {"get_image_features": _encode, **({"pack_image_features": _pack} if is_next(model) else {})}
        for name, wrapper in wrappers.items():
            before = inner.__dict__.get(name)
            stock = before or getattr(type(inner), name).__get__(inner)
            wrapped = functools.partial(wrapper, inner, before)
            wrapped.__wrapped__ = stock  # type: ignore[attr-defined]  # generate() reads its signature
            setattr(inner, name, wrapped)
            undo.append(functools.partial(restore, inner, name, before))
        undo.append(self.projector(model).register_forward_hook(_number).remove)
        undo.append(self.language_model(model).register_forward_pre_hook(_after, with_kwargs=True).remove)
        return undo


def is_next(model: Any) -> bool:
    """Whether pictures come in crops of several resolutions (LLaVA-NeXT)."""
    return any(c.__name__ == CLASSES[1] for c in type(model).__mro__)


def _number(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """Projector hook: patches are numbered over all pictures unless packing rearranges them."""
    vision = VISION.get()
    if vision is not None and vision.source is None:
        vision.source = torch.arange(output.shape[0] * output.shape[1], device=output.device)


def _encode(inner: Any, before: Any, *args: Any, **kwargs: Any) -> Any:
    """The package's encoding; what the tower left travels with it, since generate() encodes ahead of the prefill."""
    out = (before or type(inner).get_image_features.__get__(inner))(*args, **kwargs)
    out.llava_prune = VISION.get()
    return out


def _pack(inner: Any, before: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
    """The package's packing, run once more on patch numbers."""
    stock = before or type(inner).pack_image_features.__get__(inner)
    out = stock(features, *args, **kwargs)
    vision = VISION.get()
    if vision is not None:
        if vision.cut is not None:
            sizes = args[0] if args else kwargs["image_sizes"]
            vision.cut.pictures = [_layout(inner, f.shape[0], size) for f, size in zip(features, sizes, strict=True)]
        numbers, start = [], 1
        for f in features:
            n = f.shape[0] * f.shape[1]
            numbers.append(torch.arange(start, start + n, device=f.device, dtype=torch.float32).view(*f.shape[:2], 1))
            start += n
        newline = kwargs.get("image_newline")
        again = {**kwargs, "image_newline": None if newline is None else newline.new_zeros(1).float()}
        packed = stock(numbers, *args, **again)[0]
        vision.source = torch.cat([p.flatten() for p in packed]).round().long() - 1
    return out


def _layout(inner: Any, crops: int, size: Any) -> tuple[int, int, int]:
    """(crops, rows of crops, columns of crops) of a picture; see `Rows.pictures`."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    if crops == 1:
        return 1, 0, 0
    config = inner.config
    return crops, *get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of the multimodal model: where are the placeholders of a prefill?"""
    ids = args[0] if args else kwargs.get("input_ids")
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    pictures = kwargs.get("pixel_values") is not None or encoded is not None
    if request_of(kwargs.get("past_key_values")) is not None:
        if ids is None or ids.shape[1] > 1:
            PENDING.set(None)  # of a prefill that failed on the way
            if pictures:
                refuse_picture(kwargs["past_key_values"].get_seq_length())
        return
    PENDING.set(None)
    if ids is None:
        if pictures:
            raise ValueError("a pruned model needs input_ids to find the pictures; do not pass inputs_embeds with them")
        return
    if pictures and ids.shape[1] > 1:
        PENDING.set(Pending(ids == module.config.image_token_id))
        if encoded is not None:
            VISION.set(getattr(encoded, "llava_prune", None))


def _after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of the language model: the tower has run by now, so say which patch is behind which token."""
    if request_of(kwargs.get("past_key_values")) is not None:
        return
    pending, vision = PENDING.get(), VISION.get()
    if pending is None or vision is None:
        return
    VISION.set(None)
    if vision.source is None or not (vision.carry or vision.cut is not None):
        return
    pending.carry, pending.cut = vision.carry, vision.cut
    pending.source = _spread(pending.visual, vision.source)


def _spread(visual: Tensor, source: Tensor) -> Tensor:
    """(B, L) long: patch numbers (V,) laid on the visual tokens; beams repeat whole samples."""
    count, patches = visual.sum(1), source.shape[0]  # (B,)
    times = (count.sum() // patches).clamp(min=1)
    sample = torch.arange(visual.shape[0], device=visual.device)
    start = (count.cumsum(0) - count)[sample // times * times] // times  # (B,) the first patch of each sample
    places = visual.cumsum(1) - 1 + start[:, None]
    return source[places.clamp(0, patches - 1)].masked_fill(~visual, -1)
