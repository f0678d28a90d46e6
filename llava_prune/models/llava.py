"""Support of haotian-liu/LLaVA's own classes (package `llava`)."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.views import ImageLayout
from ..ops.selection import to_device
from ..runtime.compat import CACHE, given_cache
from ..runtime.decode import decode_state, refuse_later_image
from ..runtime.geometry import Geometry
from ..runtime.language import refuse_embeddings, refuse_labels
from ..runtime.merging import Tower
from ..runtime.patching import replace_method
from ..runtime.prompt import check_shapes
from ..runtime.sizes import checked_sizes
from ..runtime.state import ImageState, RequestState, Splice, request, request_of, with_hints
from ..runtime.vision import AGAIN
from .base import block_index, encoder_blocks, image_tokens, tower_kind

IMAGE = -200
"""Placeholder id of an image in the package's prompts."""
IGNORE = -100
"""The package's label of positions that are not text."""


class Llava:
    """The family of `llava.model.LlavaLlamaForCausalLM` and `LlavaMistralForCausalLM`."""

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

    def encoder(self, model: Any) -> Any:
        return self.tower(model).vision_tower

    def projector(self, model: Any) -> nn.Module:
        return model.model.mm_projector

    def tower_facts(self, model: Any) -> Tower:
        tower = self.tower(model)
        kind, leading = tower_kind(self.encoder(model))
        depth, side = len(encoder_blocks(self.encoder(model))), tower.num_patches_per_side
        whole = getattr(tower, "select_feature", "patch") == "cls_patch"
        return Tower(
            kind=kind,
            leading=leading,
            depth=depth,
            feature_layer=block_index(tower.select_layer, depth) if depth else -1,
            grid=(side, side),
            features=side * side + (0 if leading is None else leading - (not whole)),
            crops=_crops(model),
            padded=getattr(model.config, "image_aspect_ratio", None) == "pad",
        )

    def geometry(self, model: Any) -> Geometry:
        facts = self.tower_facts(model)
        return Geometry(
            grid=facts.grid,
            side=self.tower(model).config.image_size,
            padded=facts.padded,
            leading=facts.features - facts.patches,
            resolutions=tuple((w, h) for w, h in _pinpoints(model)),
            merge=getattr(model.config, "mm_patch_merge_type", "flat"),
        )

    def max_visual(self, model: Any) -> int:
        side, size = self.tower(model).num_patches_per_side, self.tower(model).config.image_size
        tall = max((h // size for _, h in _pinpoints(model)), default=0)
        return image_tokens(side, side, _crops(model), tall)

    def install(self, model: Any, handle: Any) -> list[Any]:
        accept_cache(type(model))
        return [
            replace_method(model, "generate", _generate, handle),
            replace_method(model, "forward", _forward, handle),
            replace_method(model, "prepare_inputs_labels_for_multimodal", _prepare, handle, model),
            replace_method(model, "encode_images", _encode, handle),
        ]


def _pinpoints(model: Any) -> list[tuple[int, int]]:
    """Return the (width, height) at which images are split into crops; empty if they are encoded whole."""
    points = getattr(model.config, "image_grid_pinpoints", None)
    anyres = getattr(model.config, "image_aspect_ratio", None) == "anyres"
    return list(points) if anyres and isinstance(points, (list, tuple)) else []


def _crops(model: Any) -> int:
    size = model.get_vision_tower().config.image_size
    return max(((w // size) * (h // size) + 1 for w, h in _pinpoints(model)), default=1)


@contextlib.contextmanager
def _open(handle: Any, images: Any, image_sizes: Any) -> Iterator[RequestState]:
    """Open a request for a call with images; in this package the call also has their sizes."""
    with contextlib.ExitStack() as stack:
        if image_sizes is not None:
            known: dict[str, Any] = {"image_sizes": checked_sizes(image_sizes), "sizes_given": True}
            if request_of(handle) is not None:  # hints of the enclosing request do not apply to a nested call
                known |= {"image_keys": None, "prompts": None}
            stack.enter_context(with_hints(**known))
        yield stack.enter_context(request(handle, images))


def _generate(handle: Any, stock: Any, inputs: Any = None, images: Any = None, image_sizes: Any = None, **kwargs: Any):  # type: ignore[no-untyped-def]
    """Replace `generate`, which splices text and images itself and passes embeddings to `forward`."""
    cache: Any = given_cache(kwargs)
    if images is not None and decode_state(cache) is not None:
        refuse_later_image(cache.get_seq_length())
    with _open(handle, images, image_sizes) as state:
        state.has_ids = True  # the package refuses inputs_embeds
        return stock(inputs, images, image_sizes, **kwargs)


def accept_cache(cls: Any) -> None:
    """Make a class of the package accept the KV cache under the name that the installed transformers gives it.

    The package names the argument `past_key_values`. Since transformers 5.24, generate() passes it as `cache`.
    """
    stock = cls.forward
    if CACHE == "past_key_values" or getattr(stock, "accepts_cache", False):
        return

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE)
        return stock(self, *args, **kwargs)

    warnings.filterwarnings("ignore", "`past_key_values` is|Both `past_key_values`", FutureWarning, r"llava\.")
    forward.accepts_cache = True  # type: ignore[attr-defined]
    cls.forward = forward


FORWARD = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "output_attentions", "output_hidden_states", "images", "image_sizes", "return_dict",
)  # fmt: skip


def _forward(handle: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace `forward` and open a request in it; embeddings are accepted from `generate` only."""
    given = {**dict(zip(FORWARD, args, strict=False)), **kwargs}
    ids, images = given.get("input_ids"), given.get("images")
    if given.get("inputs_embeds") is None and decode_state(given_cache(given)) is not None:
        return stock(*args, **kwargs)
    if given.get("inputs_embeds") is None:
        if images is not None and given.get("labels") is not None and ids is not None and ids.shape[1] > 1:
            refuse_labels()
        with _open(handle, images, given.get("image_sizes")) as state:
            state.has_ids = True
            return state.checked(stock(*args, **kwargs))
    parent = request_of(handle)
    if parent is None or not (parent.splice or parent.has_ids):
        refuse_embeddings()
    with request(handle) as state:
        state.splice, state.has_ids = parent.splice, parent.splice is None
        return state.checked(stock(*args, **kwargs))


def _prepare(
    handle: Any,
    model: Any,
    stock: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    labels: Tensor | None,
    images: Any,
    image_sizes: Any = None,
) -> tuple[Any, ...]:
    """Replace the package's splice: run it with labels and a mask, from which the positions of the images follow."""
    given = (input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
    state = request_of(handle)
    if decode_state(past_key_values) is not None:
        if images is not None and input_ids.shape[1] > 1:
            refuse_later_image(past_key_values.get_seq_length())
        return stock(*given)
    if state is None or state.splice is not None or images is None or input_ids.shape[1] == 1:
        return stock(*given)
    check_shapes(input_ids.shape[0], input_ids.shape[1], attention_mask)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    if _crop_counts(images) is not None:
        state.layout = functools.partial(_image_layouts, model, images, image_sizes)
    out = stock(input_ids, position_ids, mask, past_key_values, torch.zeros_like(input_ids), images, image_sizes)
    _warn_of_truncation(model, input_ids, images, out[4].shape[1])
    visual = (out[5] == IGNORE) & out[2].bool()  # (B, L)
    found = state.images or ImageState()
    if handle.vision.sees_patches and not found.encoded:
        raise ValueError(
            f"{handle.method.name or handle.method!r} prunes images while they are encoded, and the vision tower did "
            "not run in this call; detach the method where encode_images is replaced. " + AGAIN
        )
    source = None
    if found.needs_source:
        source = _source(model, stock, state, input_ids, mask, images, image_sizes, visual)
    if found.tokens is not None:
        found.tokens.layout = _layouts(model, images, image_sizes)
    state.splice = functools.partial(Splice, visual, source, found)
    return (*out[:2], None if attention_mask is None else out[2], *out[3:5], None)


def context_limit(model: Any) -> int | None:
    """Return the number of tokens, images included, after which the package truncates a prompt; None for no limit."""
    limit: int | None = getattr(model.config, "tokenizer_model_max_length", None)
    return limit


def _warn_of_truncation(model: Any, input_ids: Tensor, images: Any, length: int) -> None:
    """Warn if the package has probably truncated the end of a prompt, which holds the question."""
    limit, crops = context_limit(model), _crop_counts(images)
    n = len(images) if crops is None else sum(crops)
    most = input_ids.shape[1] + n * model.get_vision_tower().num_patches
    if limit is not None and length == limit and most > limit:
        warnings.warn(
            f"the prompt reaches the model's context of {limit} tokens (tokenizer_model_max_length), and package llava "
            "cuts off what is beyond: the end of the prompt, which holds the question; use fewer images",
            stacklevel=4,
        )


def _crop_counts(images: Any) -> list[int] | None:
    """Return the number of crops of each image in a list or 5-D tensor of images; None for a batch (N, 3, H, W)."""
    if isinstance(images, (list, tuple)) or images.ndim == 5:
        return [x.shape[0] if x.ndim == 4 else 1 for x in images]
    return None


def _layouts(model: Any, images: Any, image_sizes: Any) -> list[tuple[int, int, int]]:
    """Return (crops, rows of crops, columns of crops) of each image; see `VisionTokens.layout`."""
    from llava.mm_utils import get_anyres_image_grid_shape

    crops = _crop_counts(images)
    if crops is None:
        return [(1, 0, 0)] * images.shape[0]
    if getattr(model.config, "image_aspect_ratio", None) != "anyres" or image_sizes is None:
        return [(n, 0, 0) for n in crops]
    out = []
    for n, size in zip(crops, image_sizes, strict=True):
        side = model.get_vision_tower().config.image_size
        columns, rows = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side)
        out.append((n, rows, columns) if n > 1 and rows * columns == n - 1 else (n, 0, 0))
    return out


def _image_layouts(model: Any, images: Any, image_sizes: Any) -> list[ImageLayout]:
    """Compute `VisionView.layout`."""
    sizes = [None] * len(images) if image_sizes is None else checked_sizes(image_sizes)
    return [ImageLayout(*cut, size) for cut, size in zip(_layouts(model, images, image_sizes), sizes, strict=True)]


def _encode(handle: Any, stock: Any, images: Any) -> Any:
    """Replace `encode_images`: return patch numbers instead of features while `_source` runs the splice on them."""
    state = request_of(handle)
    return stock(images) if state is None or state.numbers is None else state.numbers


def _source(
    model: Any,
    stock: Any,
    state: RequestState,
    input_ids: Tensor,
    mask: Tensor,
    images: Any,
    image_sizes: Any,
    visual: Tensor,
) -> Tensor:
    """Return (B, L) long: the patch of each visual token, numbered over all images; -1 for newline tokens.

    For images in crops (anyres), the package's splice runs a second time on patch numbers instead of features, so its
    own packing determines the order. All channels of a patch then have the same value, which distinguishes patches from
    newline vectors.
    """
    crops = _crop_counts(images)
    patches = model.get_vision_tower().num_patches
    if crops is None or getattr(model.config, "mm_patch_merge_type", "flat") == "flat":
        named = ((input_ids == IMAGE) & mask.bool()).sum(1)
        used = named.clamp(min=1)  # the package takes one image for a sample without an image
        first = used.cumsum(0) - used  # (B,) number of each sample's first image
        if crops is not None:
            before = to_device([sum(crops[:i]) for i in range(len(crops) + 1)], first)
            first = before[first.clamp(max=len(crops))]
        offset = (first * patches).to(visual.device)[:, None]
        return (visual.cumsum(1) - 1 + offset).masked_fill(~visual, -1)
    width = model.config.hidden_size
    numbers = torch.arange(1, sum(crops) * patches + 1, device=visual.device, dtype=torch.float32)
    state.numbers = numbers.view(-1, patches, 1).expand(-1, -1, width)
    try:
        embeds = stock(input_ids, None, mask, None, torch.zeros_like(input_ids), images, image_sizes)[4].float()
    finally:
        state.numbers = None
    number = embeds[..., 0].round().long()
    real = visual & (embeds == embeds[..., :1]).all(-1) & (number >= 1)
    return (number - 1).masked_fill(~real, -1)
