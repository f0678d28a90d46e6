"""The state of a request: opened by the outermost call, found by everything below, carried by the KV cache afterwards.

`generate()` and `forward()` of an attached model open a `RequestState` in the one context variable of the package, and
close it on the way out, also after an exception. Hooks on the vision tower and the projector, the place where the
package splices text and images, and the entry of the language model find it there. Without an open request of their own
model they do nothing, so an encoder that the user calls directly returns its true features. The prefill hangs a
`DecodeState` on the KV cache, where every later token finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .merging import Merging

Sizes = list[tuple[int, int]]


# what callers say ahead of a request --------------------------------------------------------------------------


@dataclass(frozen=True)
class HostPrompts:
    """Prompts whose token ids are known on the host, padded on the left.

    Attributes:
        rows: token ids of each prompt.
        image: the id that stands for an image.
        patches: visual tokens of an image.
    """

    rows: Sequence[Sequence[int]]
    image: int
    patches: int


@dataclass
class Hints:
    """What a caller knows of the next request.

    Attributes:
        image_sizes: (width, height) of the images before padding.
        image_keys: identities of the images, for the image cache; valid for a single pass of the vision tower.
        prompts: token ids on the host.
        explicit: whether the caller said something about sizes, be it None.
        logits_to_keep: number of logits that the caller wants; 0 for all, which the caller has to line up.
    """

    image_sizes: Sizes | None = None
    image_keys: list[Hashable] | None = None
    prompts: HostPrompts | None = None
    explicit: bool = False
    logits_to_keep: int = 0

    def take_keys(self) -> list[Hashable] | None:
        """The keys, once."""
        keys, self.image_keys = self.image_keys, None
        return keys


# the images of a request --------------------------------------------------------------------------------------


@dataclass
class TowerPass:
    """What one pass of the vision tower leaves.

    Attributes:
        queries: block -> query positions whose attention is recorded.
        attention: block -> what the block showed.
        cls: (N, Dv) feature of the class token.
        merging: tokens merged inside the tower, None where nothing merges.
        merges: whether a method that merges inside the tower does so in this pass.
    """

    queries: dict[int, list[int]]
    attention: dict[int, Any] = field(default_factory=dict)
    cls: Tensor | None = None
    merging: Merging | None = None
    merges: bool = True


@dataclass
class Chosen:
    """What a method chose, before the projector has run.

    Attributes:
        index: (N, K) long, the tokens among what the projector is given.
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
    """What enters the language model in place of the patches of N images or crops.

    Attributes:
        embeds: (N, K, D) after the projector; the first counts[n] tokens are live.
        ids: (N, K) long, patch of each token, MERGED for none.
        counts: live tokens of each image or crop.
        grid: (rows, columns) of patches of one.
        by_canvas: see VisionCut.
        packed: the tokens are patches and stay where the package packs them.
        layout: (crops, rows of crops, columns of crops) of each image; rows and columns are 0 where the crops are not
            laid out.
        groups: see VisionCut; positions among the K here.
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
    """The images of a request, encoded.

    Attributes:
        tower: what the vision tower left, until the projector has run.
        chosen: what the method chose, until the projector has run.
        tokens: what replaces the patches; None where every patch is kept.
        patch_values: name -> (N, T).
        source: (V,) long, the patch of each visual token in the order in which the package packs them, -1 for none.
        encoded: whether the projector has run.
        interpolated: whether the package made fewer tokens of the patches of an image (LLaVA-OneVision); `source` has
            the nearest patch then.
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
    """Where the visual tokens of a prompt are.

    Attributes:
        visual: (B, L) bool.
        source: (B, L) long, patch of each visual token (counted over the images of the request), -1 where there is
            none (a newline token, text); None where nobody needs it.
        images: the images of the prompt.
    """

    visual: Tensor
    source: Tensor | None
    images: ImageState


# the request --------------------------------------------------------------------------------------------------


@dataclass
class RequestState:
    """One call of an attached model.

    Attributes:
        handle: of the attachment.
        hints: what the caller said ahead.
        parent: the enclosing call of the same attachment, or None.
        images: images that this call encoded, None before.
        splice: gives the place of the visual tokens when the language model is entered; None for a call without images.
        has_ids: whether the prompt was given as token ids, so that it is known to be text where there is no splice.
        numbers: (N, T, D) patch numbers that stand for features while package llava's splice is asked for their order.
    """

    handle: Any
    hints: Hints
    parent: RequestState | None = None
    images: ImageState | None = None
    splice: Callable[[], Splice] | None = None
    has_ids: bool = False
    numbers: Tensor | None = None


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
    """What the caller said ahead of the current request."""
    return _current().hints


@contextmanager
def hinting(**known: Any) -> Iterator[Hints]:
    """Say something ahead of the requests in the block; fields of `Hints`."""
    made = replace(hints(), **known)
    with _entered(replace(_current(), hints=made)):
        yield made


@contextmanager
def request(handle: Any, images: int | None = None) -> Iterator[RequestState]:
    """Open a request for the length of the block.

    Args:
        handle: of the attachment.
        images: images that the call brings itself; None when it brings none.

    Raises:
        ValueError: when the sizes that the caller gave do not fit the number of images.
    """
    context = _current()
    parent = active(handle)
    given = context.hints
    if parent is not None and images is not None:
        if parent.images is not None and given is parent.hints:  # a call inside the request, with images of its own
            given = Hints()
    elif images is not None and given.image_sizes is not None and len(given.image_sizes) != images:
        raise ValueError(
            f"{len(given.image_sizes)} image sizes for {images} images; give one (width, height) for each image"
        )
    made = RequestState(handle, given, parent)
    with _entered(_Context(given, made)):
        yield made


def active(handle: Any) -> RequestState | None:
    """The innermost open request, if it is of this attachment."""
    found = _current().request
    return found if found is not None and found.handle is handle else None


def innermost() -> RequestState | None:
    """The innermost open request of any attachment."""
    return _current().request


def tower_pass() -> TowerPass | None:
    """Where the blocks of the vision tower record now; None where nobody asks."""
    context = _current()
    if context.tower is not None:
        return context.tower
    images = None if context.request is None else context.request.images
    return None if images is None or images.encoded else images.tower


@contextmanager
def recording(into: TowerPass) -> Iterator[TowerPass]:
    """Let the vision tower record into `into` for the length of the block."""
    with _entered(replace(_current(), tower=into)):
        yield into
