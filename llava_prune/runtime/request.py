"""State of one request, carried by its cache, and the record that users read afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core.select import fold_tokens
from ..core.types import FILLER, TEXT, Fold
from .rows import Tap


@dataclass
class Pending:
    """What the splice of text and pictures leaves for the prefill that follows it.

    Attributes:
        visual: (B, L) bool.
        source: (B, L) long, patch (flattened over the pictures of the request) behind each visual token, -1 where
            there is none (a newline token, text); None when the tower left nothing to look up.
        carry: name -> (N, T) values of the patches.
        cut: the rows that `reduce` put in place of the patches; None where it left them alone.
    """

    visual: Tensor
    source: Tensor | None = None
    carry: dict[str, Tensor] = field(default_factory=dict)
    cut: Rows | None = None


@dataclass
class Rows:
    """What goes to the language model in place of the patches of N pictures or crops.

    Attributes:
        embeds: (N, K, D) behind the projector; the first counts[n] rows are live.
        ids: (N, K) long, patch behind each row, MERGED for none.
        counts: live rows of each picture or crop.
        grid: (rows, columns) of patches of one.
        canvas: see VisionCut.
        packed: the rows are patches and stand where the package's packing puts them.
        pictures: (crops, rows of crops, columns of crops) of each picture; rows and columns are 0 where the crops
            are not laid out.
    """

    embeds: Tensor
    ids: Tensor
    counts: list[int]
    grid: tuple[int, int]
    canvas: bool
    packed: bool
    pictures: list[tuple[int, int, int]]


@dataclass
class Merging:
    """Tokens of a tower that merges, the class token being the first.

    Attributes:
        size: (N, t) float32, patches in each token now.
        groups: (N, 1 + T) long, the token that each of the first block's tokens is in now.
        merged: whether any token stands for several.
    """

    size: Tensor
    groups: Tensor
    merged: bool = False

    @staticmethod
    def fresh(n: int, t: int, device: torch.device) -> Merging:
        return Merging(torch.ones(n, t, device=device), torch.arange(t, device=device).expand(n, t))

    def fold(self, fold: Fold, hidden: Tensor) -> Tensor:
        """(N, t', D) states after a merge, which is noted."""
        states, self.size, self.groups = fold_tokens(fold, hidden, self.size, self.groups)
        self.merged = True
        return states


@dataclass
class Vision:
    """What the tower leaves for the projector, and the projector for the splice.

    Attributes:
        sizes: (width, height) of the pictures before padding.
        variant: the tower that a method has changed, None for the tower as it is.
        taps: what blocks show, by block.
        cls: (N, Dv) feature of the class token.
        merging: what was merged inside the tower, one entry for each of its calls.
        carry, cut, source, pictures: see Pending and Rows.
    """

    sizes: list[tuple[int, int]] | None = None
    variant: Hashable = None
    taps: dict[int, Tap] = field(default_factory=dict)
    cls: Tensor | None = None
    merging: list[Merging] = field(default_factory=list)
    carry: dict[str, Tensor] = field(default_factory=dict)
    cut: Rows | None = None
    source: Tensor | None = None
    pictures: list[tuple[int, int, int]] | None = None


PENDING: ContextVar[Pending | None] = ContextVar("llava_prune_pending", default=None)


@dataclass(frozen=True)
class Known:
    """Prompts whose ids are known on the host, padded on the left.

    Attributes:
        rows: token ids of each prompt.
        image: the id that stands for a picture.
        patches: visual tokens of a picture.
    """

    rows: Sequence[Sequence[int]]
    image: int
    patches: int


VISION: ContextVar[Vision | None] = ContextVar("llava_prune_vision", default=None)
PROMPTS: ContextVar[Known | None] = ContextVar("llava_prune_prompts", default=None)
SIZES: ContextVar[list[tuple[int, int]] | None] = ContextVar("llava_prune_sizes", default=None)


@dataclass
class Stage:
    """Layers from `first` on share this sequence: (B, L) mask (None when all rows live) and its length."""

    first: int
    valid: Tensor | None
    length: int


@dataclass
class Request:
    """Made in prefill, found again by every later step through the cache object.

    Attributes:
        stages: ascending by first layer, the first at layer 0.
        length: columns of the prompt as generate() counts them.
        starts: (S, B, 1) position of the next token in each stage, or (1, B, 1) when all stages share it.
        whole: False once a later turn brought tokens that may be padding.
    """

    stages: list[Stage]
    length: int
    starts: Tensor
    whole: bool = True


def request_of(cache: Any) -> Request | None:
    """The request that a cache with tokens in it belongs to; None for a new cache or an unpruned one."""
    request: Request | None = getattr(cache, "_llava_prune", None)
    return request if request is not None and cache.get_seq_length() else None


def refuse_picture(past: int) -> NoReturn:
    """A picture that comes after the prefill."""
    raise ValueError(
        f"a picture after {past} cached tokens: pictures are pruned in the prefill only; start a new cache with the "
        "whole conversation"
    )


@dataclass
class Trace:
    """Raw log of a prefill; one (ids, visual) pair for each layer's entry and one for the last exit."""

    entries: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    final: Callable[[], tuple[Tensor, Tensor]] | None = None
    scratch: dict[str, Any] = field(default_factory=dict)

    def last(self) -> tuple[Tensor, Tensor]:
        """What leaves the last layer."""
        return self.entries[-1] if self.final is None else self.final()


class Record:
    """The last prefill of an attached model.

    Attributes:
        tokens_in: (B, n_layers) long, visual tokens entering each layer.
        tokens_out: (B, n_layers) long, visual tokens leaving each layer.
        kept: list over layers of (B, n) long, original indices of the visual tokens that leave the layer, in
            sequence order; -1 for a merged token, -2 for filler.
        stats: name -> list of B floats (AutoPrune: mi0, mi1, slope, scale).
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._entries: list[tuple[Tensor, Tensor]] | None = None

    def _all(self) -> list[tuple[Tensor, Tensor]]:
        if self._entries is None:
            self._entries = [*self._trace.entries, self._trace.last()]
            self._trace.final = None
        return self._entries

    @property
    def tokens_in(self) -> Tensor:
        return torch.stack([v.sum(1) for _, v in self._trace.entries], 1).cpu()

    @property
    def tokens_out(self) -> Tensor:
        return torch.stack([v.sum(1) for _, v in self._all()[1:]], 1).cpu()

    @property
    def kept(self) -> list[Tensor]:
        return [visual_ids(ids.cpu(), visual.cpu()) for ids, visual in self._all()[1:]]

    @property
    def stats(self) -> dict[str, list[float]]:
        return dict(self._trace.scratch.get("stats", {}))


def visual_ids(ids: Tensor, visual: Tensor) -> Tensor:
    """(B, n) original indices of the visual tokens in sequence order, padded with FILLER at the end."""
    width = int(visual.sum(1).max()) if visual.numel() else 0
    order = (~visual).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    return ids.gather(1, order).masked_fill(~visual.gather(1, order), FILLER)


def original_ids(visual: Tensor) -> Tensor:
    """(B, L) long: index among a sample's visual tokens, TEXT elsewhere."""
    return (visual.cumsum(1) - 1).masked_fill(~visual, TEXT)
