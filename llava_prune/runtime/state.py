"""The state of a request, held in a context variable.

`generate()` and `forward()` of an attached model open a `RequestState` in the only context variable of this package,
and close it when they return or raise. The hooks on the vision tower and the projector, the replaced splice of text and
images, and the forward of the language model read it there. Without an open request of their own model they do nothing,
so an encoder that the user calls directly returns its unpruned features. The prefill attaches a `DecodeState` to the KV
cache, from which every decoding step reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..methods.views import ImageLayout
from .merging import Merging

Sizes = list[tuple[int, int]]


# hints that callers give before a request ---------------------------------------------------------------------


@dataclass(frozen=True)
class HostPrompts:
    """Prompts whose token ids are known on the host, padded on the left.

    Attributes:
        rows: token ids of each prompt.
        image: the token id that stands for an image.
        patches: number of visual tokens of an image.
    """

    rows: Sequence[Sequence[int]]
    image: int
    patches: int


@dataclass
class Hints:
    """Facts about the next request that the caller states in advance.

    Attributes:
        image_sizes: (width, height) of the images before padding.
        image_keys: keys of the images in the image cache; valid for a single pass of the vision tower.
        prompts: token ids on the host.
        questions: one question for each image.
        sizes_given: whether the caller has stated `image_sizes`, even as None.
        logits_to_keep: number of logits that the caller wants; 0 for all logits, which the caller then has to align
            with the input ids.
    """

    image_sizes: Sizes | None = None
    image_keys: list[Hashable] | None = None
    prompts: HostPrompts | None = None
    questions: list[str] | None = None
    sizes_given: bool = False
    logits_to_keep: int = 0

    def take_keys(self) -> list[Hashable] | None:
        """Return `image_keys` and clear them, so that only one pass of the vision tower uses them."""
        keys, self.image_keys = self.image_keys, None
        return keys


# the images of a request --------------------------------------------------------------------------------------


@dataclass
class TowerPass:
    """The recordings of one pass of the vision tower.

    Attributes:
        queries: block -> query positions whose attention is recorded.
        attention: block -> `RecordedAttention` of the block.
        cls: (N, Dv) feature of the class token.
        merging: the state of merging inside the tower, None if nothing is merged.
        pixels: (N, 3, H, W) input of the tower; None if the input is not a 4-D tensor.
        merges: whether a method that merges inside the tower merges in this pass.
    """

    queries: dict[int, list[int]]
    attention: dict[int, Any] = field(default_factory=dict)
    cls: Tensor | None = None
    merging: Merging | None = None
    pixels: Tensor | None = None
    merges: bool = True


@dataclass
class Chosen:
    """The tokens of a `VisionCut` before the projector has run.

    Attributes:
        index: (N, K) long, the positions of the tokens in the input of the projector.
        ids, counts, by_canvas, packed, groups: see VisionTokens.
    """

    index: Tensor
    ids: Tensor
    counts: list[int]
    by_canvas: bool
    packed: bool
    groups: Callable[[], Tensor] | None


@dataclass
class VisionTokens:
    """The tokens that enter the language model in place of the patches of N images or crops.

    Attributes:
        embeds: (N, K, D) after the projector; the first counts[n] tokens are live.
        ids: (N, K) long, the patch of each token, MERGED for a token that stands for no patch.
        counts: number of live tokens of each image or crop.
        grid: (rows, columns) of patches of one image or crop.
        by_canvas: see VisionCut.
        packed: whether the tokens are patches that stay at the positions where the package packs them.
        layout: (crops, rows of crops, columns of crops) of each image; rows and columns are 0 if the crops do not form
            a grid.
        groups: see VisionCut; its positions refer to the K tokens of `ids`.
    """

    embeds: Tensor
    ids: Tensor
    counts: list[int]
    grid: tuple[int, int]
    by_canvas: bool
    packed: bool
    layout: list[tuple[int, int, int]]
    groups: Callable[[], Tensor] | None = None


@dataclass
class ImageState:
    """The state of the images of a request.

    Attributes:
        tower: recordings of the vision tower; None once the projector has run.
        chosen: tokens that the method chose; None once the projector has run.
        tokens: the tokens that replace the patches; None if every patch is kept.
        patch_values: name -> (N, T) values that the method stored for the patches.
        source: (V,) long, the patch of each visual token in the order in which the package packs them, -1 for a token
            without a patch.
        encoded: whether the projector has run.
        interpolated: whether the package interpolated the patches of an image to fewer tokens (LLaVA-OneVision);
            `source` then holds the nearest patch.
    """

    tower: TowerPass | None = None
    chosen: Chosen | None = None
    tokens: VisionTokens | None = None
    patch_values: dict[str, Tensor] = field(default_factory=dict)
    source: Tensor | None = None
    encoded: bool = False
    interpolated: bool = False

    @property
    def needs_source(self) -> bool:
        """Whether the language model must know the patch of each visual token."""
        return bool(self.patch_values) or self.tokens is not None


@dataclass
class Splice:
    """The positions of the visual tokens in a prompt.

    Attributes:
        visual: (B, L) bool, visual tokens.
        source: (B, L) long, patch of each visual token (numbered over all images of the request), -1 for positions
            without a patch (newline tokens, text); None if the patches are not needed.
        images: the images of the prompt.
    """

    visual: Tensor
    source: Tensor | None
    images: ImageState


# the request --------------------------------------------------------------------------------------------------


@dataclass
class RequestState:
    """The state of one call of an attached model.

    Attributes:
        handle: the handle of the attachment.
        hints: facts that the caller stated in advance.
        parent: the enclosing call of the same attachment, or None.
        images: the images that this call encodes; None before the vision tower runs.
        splice: returns the positions of the visual tokens, called when the language model is entered; None for a call
            without images.
        has_ids: whether the prompt was given as token ids; a prompt with ids and without a splice is text only.
        layout: returns how the images of the call were split into crops; None if images are encoded whole.
        entered: whether the language model has asked for `splice`.
        numbers: (N, T, D) patch numbers that replace the features while the splice of package llava runs a second time
            to determine the order of the patches.
        served: the images of the first call inside this one, to which the hints apply; None if this call encodes its
            images itself.
    """

    handle: Any
    hints: Hints
    parent: RequestState | None = None
    images: ImageState | None = None
    splice: Callable[[], Splice] | None = None
    has_ids: bool = False
    layout: Callable[[], list[ImageLayout]] | None = None
    entered: bool = False
    numbers: Tensor | None = None
    served: Any = None

    def checked(self, output: Any) -> Any:
        """Return the output of a forward, unless its images reached a language model that does not prune them.

        Raises:
            ValueError: if the language model has not asked for the images.
        """
        if self.splice is not None and not self.entered:
            raise ValueError(
                "the images of this request were not pruned: the language model, or its forward, was replaced after "
                "the method was attached; detach the method and attach it again"
            )
        return output


@dataclass(frozen=True)
class _Context:
    hints: Hints = field(default_factory=Hints)
    request: RequestState | None = None
    tower: TowerPass | None = None


_CONTEXT: ContextVar[_Context | None] = ContextVar("llava_prune", default=None)


def _current() -> _Context:
    return _CONTEXT.get() or _Context()


@contextmanager
def _entered(context: _Context) -> Iterator[None]:
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def hints() -> Hints:
    """Return the hints that are in effect."""
    return _current().hints


@contextmanager
def with_hints(**known: Any) -> Iterator[Hints]:
    """Set fields of `Hints` for the requests inside the block."""
    made = replace(hints(), **known)
    with _entered(replace(_current(), hints=made)):
        yield made


@contextmanager
def request(handle: Any, images: Any = None) -> Iterator[RequestState]:
    """Open a request for the duration of the block.

    The hints of an enclosing call of the same attachment belong to its own images. Where it does not encode them itself
    (generate() of older releases of transformers), they are those of the first call inside it.

    Args:
        handle: the handle of the attachment.
        images: the images among the arguments of the call, N of them; None if there are none.

    Raises:
        ValueError: if the number of image sizes in the hints differs from the number of images.
    """
    context = _current()
    parent = request_of(handle)
    given = context.hints
    if parent is not None and images is not None:
        if parent.images is None and parent.served is None:
            parent.served = images
        elif parent.served is not images and given is parent.hints:  # a nested call with its own images
            given = Hints()
    elif images is not None and given.image_sizes is not None and len(given.image_sizes) != len(images):
        raise ValueError(
            f"{len(given.image_sizes)} image sizes for {len(images)} images; give one (width, height) for each image"
        )
    made = RequestState(handle, given, parent)
    with _entered(_Context(given, made)):
        yield made


def request_of(handle: Any) -> RequestState | None:
    """Return the innermost open request if it belongs to this attachment, else None."""
    found = _current().request
    return found if found is not None and found.handle is handle else None


def current_request() -> RequestState | None:
    """Return the innermost open request of any attachment, or None."""
    return _current().request


def current_tower_pass() -> TowerPass | None:
    """Return the `TowerPass` into which the blocks of the vision tower record, or None if nothing is recorded."""
    context = _current()
    if context.tower is not None:
        return context.tower
    images = None if context.request is None else context.request.images
    return None if images is None or images.encoded else images.tower


@contextmanager
def recording(into: TowerPass) -> Iterator[TowerPass]:
    """Make the vision tower record into `into` for the duration of the block."""
    with _entered(replace(_current(), tower=into)):
        yield into
