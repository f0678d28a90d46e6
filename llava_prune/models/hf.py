"""Support of transformers' Llava, LlavaNext and LlavaOnevision classes."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.checks import shown
from ..methods.views import ImageLayout
from ..runtime.compat import given_cache
from ..runtime.decode import decode_state, refuse_later_image
from ..runtime.geometry import Geometry
from ..runtime.language import refuse_embeddings, refuse_labels
from ..runtime.merging import Tower
from ..runtime.patching import replace_method
from ..runtime.state import ImageState, RequestState, Splice, request, request_of, with_hints
from ..runtime.vision import AGAIN
from .base import block_index, encoder_blocks, image_tokens, tower_kind

CLASSES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
WITHOUT_LIMIT = "anyres_max_1000000"
"""A value of LLaVA-OneVision's `vision_aspect_ratio` with which crops are packed without interpolation."""


class HF:
    """The family of transformers' Llava, LlavaNext and LlavaOnevision."""

    name = "hf"

    def matches(self, model: Any) -> bool:
        return any(c.__name__ in CLASSES for c in type(model).__mro__)

    def language_model(self, model: Any) -> Any:
        return model.model.language_model

    def tower(self, model: Any) -> Any:
        return model.model.vision_tower

    def encoder(self, model: Any) -> Any:
        return self.tower(model)

    def projector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def tower_facts(self, model: Any) -> Tower:
        config = model.config
        kind, leading = tower_kind(self.encoder(model))
        depth, layer = len(encoder_blocks(self.encoder(model))), config.vision_feature_layer
        rows, columns = _grid(model)
        whole = config.vision_feature_select_strategy == "full"  # "default" drops the first token, whatever it is
        return Tower(
            kind=kind,
            leading=leading,
            depth=depth,
            feature_layer=block_index(layer, depth) if isinstance(layer, int) and depth else -1,
            grid=(rows, columns),
            features=rows * columns + (0 if leading is None else leading - (not whole)),
            crops=most_crops(model.config),
            padded=not has_crops(model),
        )

    def geometry(self, model: Any) -> Geometry:
        facts, points = self.tower_facts(model), model.config.image_grid_pinpoints if has_crops(model) else []
        return Geometry(
            grid=facts.grid,
            side=model.config.vision_config.image_size,
            padded=facts.padded,
            leading=max(facts.features - facts.patches, 0),
            resolutions=tuple((w, h) for h, w in points),
            unpad_decimals=7,
            max_crops=_limit(getattr(model.config, "vision_aspect_ratio", None)),
        )

    def max_visual(self, model: Any) -> int:
        rows, columns = _grid(model)
        side = model.config.vision_config.image_size
        points = getattr(model.config, "image_grid_pinpoints", None) or []
        return image_tokens(rows, columns, most_crops(model.config), max((h // side for h, _ in points), default=0))

    def install(self, model: Any, handle: Any) -> list[Any]:
        inner = model.model
        undo: list[Any] = [
            replace_method(model, "generate", _generate, handle),
            replace_method(model, "forward", _outer_forward, handle, model),
            replace_method(inner, "forward", _inner_forward, handle, inner),
            self.projector(model).register_forward_hook(functools.partial(_number_patches, handle)),
        ]
        if has_crops(model):
            undo.append(replace_method(inner, "pack_image_features", _pack, handle, inner))
        return undo


def has_crops(model: Any) -> bool:
    """Return whether the model splits images into crops (LLaVA-NeXT, LLaVA-OneVision)."""
    return any(c.__name__ in CLASSES[1:] for c in type(model).__mro__)


def _limit(rule: str | None) -> int | None:
    """Return the limit of the number of crops from `vision_aspect_ratio` of LLaVA-OneVision; see `Geometry.max_crops`.

    Args:
        rule: "anyres_max_<number>", or None for no limit.

    Raises:
        ValueError: for any other rule.
    """
    if rule is None:
        return None
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", rule)
    if found is None:
        raise ValueError(f"vision_aspect_ratio is {rule!r}; it must be anyres_max_<number>, as anyres_max_9")
    return int(found[1])


def _grid(model: Any) -> tuple[int, int]:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return side, side


def most_crops(config: Any) -> int:
    """Return the largest number of crops of an image for a config in transformers' format; 1 without crops."""
    points = getattr(config, "image_grid_pinpoints", None)
    size = config.vision_config.image_size
    return max((h // size) * (w // size) + 1 for h, w in points) if points else 1


def counted_crops(config: Any) -> int:
    """Return the number of crops that papers count for an image: the largest number, limited by anyres_max plus 1."""
    most = _limit(getattr(config, "vision_aspect_ratio", None))
    return most_crops(config) if most is None else min(most_crops(config), most + 1)


def _named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a model's forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _generate(handle: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace `generate` and open the request in it; newer transformers encode images there, before the prefill."""
    if kwargs.get("inputs_embeds") is not None:
        refuse_embeddings()
    configs = kwargs.get("generation_config", args[1] if len(args) > 1 else None), handle.model.generation_config
    if kwargs.get("prefill_chunk_size") or any(getattr(c, "prefill_chunk_size", None) for c in configs):
        raise ValueError("prefill_chunk_size on a pruned model: the whole prompt is needed at once; leave it out")
    _refuse_videos(kwargs)
    _refuse_other_layers(handle, kwargs)
    kwargs = _sizes_on_host(kwargs)
    with request(handle, kwargs.get("pixel_values")) as state:
        state.layout = _layouts_of(handle.model.model, kwargs)
        return stock(*args, **kwargs)


def _outer_forward(handle: Any, model: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the outer `forward`: refuse options that need one logit for each input id in a prefill with images."""
    given = _named(model, args, kwargs)
    keep = given.get("logits_to_keep", 0)
    if not _has_images(given) or decode_state(given_cache(given)) is not None:
        return stock(*args, **kwargs)
    if given.get("labels") is not None:
        refuse_labels()
    if not isinstance(keep, int) or keep < 0:
        raise ValueError(
            f"logits_to_keep={shown(keep)} on a pruned model: positions of the input ids are not those of the "
            "remaining tokens; give the number of last logits, 0 for all of them, or detach the method"
        )
    if keep <= 1:
        return stock(*args, **kwargs)
    with with_hints(logits_to_keep=keep):
        return stock(*args, **kwargs)


def _refuse_videos(given: dict[str, Any]) -> None:
    if given.get("pixel_values_videos") is not None or _encoded(given, "video") is not None:
        raise ValueError(
            "pixel_values_videos on a pruned model: videos are not supported; give images, or detach the method"
        )


def _sizes_on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with the image sizes on the host: one read instead of several by the package and by `_pack`."""
    sizes = kwargs.get("image_sizes")
    if not isinstance(sizes, Tensor) or sizes.device.type == "cpu":
        return kwargs
    return {**kwargs, "image_sizes": sizes.cpu()}


def _refuse_other_layers(handle: Any, given: dict[str, Any]) -> None:
    """Refuse features of another layer of the tower than the one for which the method was attached."""
    if given.get("pixel_values") is None or not handle.vision.sees_patches:
        return
    tower, layer = handle.vision.tower, given.get("vision_feature_layer")
    layer = handle.model.config.vision_feature_layer if layer is None else layer
    if not isinstance(layer, int) or block_index(layer, tower.depth) != tower.feature_layer:
        raise ValueError(
            f"vision_feature_layer={layer}: {handle.method.name or handle.method!r} was attached to features after "
            f"block {tower.feature_layer} of the vision tower; set model.config.vision_feature_layer, then attach it"
        )


def _has_images(given: dict[str, Any]) -> bool:
    return given.get("pixel_values") is not None or _encoded(given) is not None


def _encoded(given: dict[str, Any], kind: str = "image") -> Any:
    """Return the images (or videos) that were encoded before the call, or None."""
    return (given.get("mm_encoder_outputs") or {}).get(kind)


def _inner_forward(handle: Any, inner: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the multimodal model's `forward`: open a request and provide the positions of visual tokens."""
    kwargs = _sizes_on_host(kwargs)
    given = _named(inner, args, kwargs)
    ids, cache = given.get("input_ids"), given_cache(given)
    with request(handle, given.get("pixel_values")) as state:
        state.layout = _layouts_of(inner, given)
        if ids is None:
            refuse_embeddings()
        _refuse_videos(given)
        _refuse_other_layers(handle, given)
        if cache is not None and decode_state(cache) is not None:
            if _has_images(given) and ids.shape[1] > 1:
                refuse_later_image(cache.get_seq_length())
        else:
            state.has_ids = True
            if _has_images(given):
                visual = ids == inner.config.image_token_id
                state.splice = functools.partial(_splice, handle, state, visual, _encoded(given) is not None)
        return state.checked(stock(*args, **kwargs))


def _splice(handle: Any, state: RequestState, visual: Tensor, ahead: bool) -> Splice:
    """Return the positions of the visual tokens and their patches; called when the language model is entered.

    Args:
        handle: the handle of the attachment.
        state: the request state of the forward.
        visual: (B, L) bool, visual tokens.
        ahead: whether the images were encoded before the forward, in the enclosing request.

    Raises:
        ValueError: if the method needs the images to be encoded in this request, and they were not; or if it replaces
            patches and the package interpolates them.
    """
    owner = state.parent if ahead else state
    images = None if owner is None else owner.images
    if not handle.vision.sees_patches:
        return Splice(visual, None, ImageState())
    if images is None or not images.encoded:
        raise ValueError(
            f"{handle.method.name or handle.method!r} prunes images while they are encoded, and these images were "
            "encoded outside of generate() or forward(), or before the method was attached; give input_ids and "
            "pixel_values to generate() or forward(). " + AGAIN
        )
    source = None
    if images.tokens is not None and images.interpolated:
        raise ValueError(
            f"{handle.method.name or handle.method!r} chooses patches before the language model, and this model makes "
            "fewer tokens of the patches of a large image by interpolation (vision_aspect_ratio, anyres_max); give the "
            "image with fewer pixels, or use a method inside the language model, as autoprune, fastv or pdrop"
        )
    if images.needs_source and images.source is not None:
        source = _spread(visual, images.source.to(visual.device, non_blocking=True))
    return Splice(visual, source, images)


def _number_patches(handle: Any, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """Projector hook: number the patches over all images; `_pack` changes the numbers if it packs crops."""
    state = request_of(handle)
    if state is not None and state.images is not None and state.images.source is None:
        state.images.source = torch.arange(output.shape[0] * output.shape[1], device=output.device)


def _pack(handle: Any, inner: Any, stock: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the packing of crops: run it, and run it again on patch numbers to find the order of patches.

    The second run is on the host, where it costs neither kernel launches nor synchronisations.
    """
    out = stock(features, *args, **kwargs)
    state = request_of(handle)
    images = None if state is None else state.images
    if images is None:
        return out
    if images.tokens is not None:
        sizes = args[0] if args else kwargs["image_sizes"]
        images.tokens.layout = [_layout(inner, f.shape[0], size) for f, size in zip(features, sizes, strict=True)]
    numbers, start = [], 1
    for f in features:
        n = f.shape[0] * f.shape[1]
        numbers.append(torch.arange(start, start + n, dtype=torch.float32).view(*f.shape[:2], 1))
        start += n
    newline = kwargs.get("image_newline")
    again = {**kwargs, "image_newline": None if newline is None else torch.zeros(1)}
    if "vision_aspect_ratio" in kwargs:
        again["vision_aspect_ratio"] = WITHOUT_LIMIT
    packed = [p.flatten().round().long() - 1 for p in stock(numbers, *args, **again)[0]]
    images.interpolated = [len(p) for p in packed] != [len(p) for p in out[0]]
    patches, most = features[0].shape[1], _limit(kwargs.get("vision_aspect_ratio")) or 1
    pairs = zip(packed, out[0], strict=True)
    images.source = torch.cat([p if len(p) == len(o) else _nearest(p, patches, most) for p, o in pairs])
    return out


def _nearest(numbers: Tensor, patches: int, most: int) -> Tensor:
    """Return the nearest patch of each token of an image that the package interpolates, -1 for newline tokens.

    Args:
        numbers: (P + H (W + 1),) long, patch numbers of the image without interpolation: the whole image, then H rows.
        patches: P, number of patches of a crop.
        most: limit of the number of crops; see `Geometry.max_crops`.

    Source: `pack_image_features` of LlavaOnevision; the nearest patch is that of torch's "nearest-exact".
    """
    rest = numbers[patches:]
    width = int((rest < 0).to(torch.int8).argmax())  # the first newline token ends the first row
    grid = rest.view(-1, width + 1)[:, :width]  # (H, W)
    ratio = math.sqrt(grid.numel() / (most * patches))
    sizes = [int(n // ratio) for n in grid.shape]
    rows, columns = (
        (2 * torch.arange(k, device=numbers.device) + 1) * n // (2 * k) for n, k in zip(grid.shape, sizes, strict=True)
    )
    coarse = nn.functional.pad(grid[rows][:, columns], (0, 1), value=-1)  # (H', W' + 1)
    return torch.cat([numbers[:patches], coarse.flatten()])


def _layouts_of(inner: Any, given: dict[str, Any]) -> Callable[[], list[ImageLayout]] | None:
    """Return a function that computes `VisionView.layout`; None for images that are encoded whole."""
    sizes = given.get("image_sizes")
    if sizes is None or not getattr(inner.config, "image_grid_pinpoints", None):
        return None

    def found() -> list[ImageLayout]:
        out = []
        for height, width in torch.as_tensor(sizes).tolist():
            _, rows, columns = _layout(inner, 0, (height, width))
            out.append(ImageLayout(1 + rows * columns, rows, columns, (width, height)))
        return out

    return found


def _layout(inner: Any, crops: int, size: Any) -> tuple[int, int, int]:
    """Return (crops, rows of crops, columns of crops) of an image; see `VisionTokens.layout`."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    if crops == 1:
        return 1, 0, 0
    config = inner.config
    return crops, *get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)


def _spread(visual: Tensor, source: Tensor) -> Tensor:
    """Return (B, L) long: patch numbers (V,) assigned to the visual tokens in order; beams repeat whole samples."""
    count, patches = visual.sum(1), source.shape[0]  # (B,)
    times = (count.sum() // patches).clamp(min=1)
    sample = torch.arange(visual.shape[0], device=visual.device)
    start = (count.cumsum(0) - count)[sample // times * times] // times  # (B,) the first patch of each sample
    places = visual.cumsum(1) - 1 + start[:, None]
    return source[places.clamp(0, patches - 1)].masked_fill(~visual, -1)
