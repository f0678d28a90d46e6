"""The record of a prefill, which users read from `handle.last`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..methods.base import Method
from ..methods.checks import shown
from ..methods.views import MERGED, PADDING, TEXT
from ..ops.selection import true_first
from .geometry import ImageView, Seen

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

PANELS = 6
"""Number of layers that `Record.show` draws by default."""


@dataclass(frozen=True)
class Step:
    """The log entry of one cut.

    Attributes:
        layer: the layer after which it was made, -1 for a cut before the first layer.
        index: (B, L') long, see `Cut.index`.
        ids: (B, C) long, original indices of the new tokens if these are patches, MERGED for those that are not; None
            if all new tokens are merged ones.
        members: see `Cut.members`.
    """

    layer: int
    index: Tensor
    ids: Tensor | None
    members: Callable[[], tuple[Tensor, Tensor]] | None


class Remaining(NamedTuple):
    """The visual tokens of a sample that leave a layer.

    Attributes:
        kept: original indices of the tokens that are patches.
        merged: for each merged token, original indices of the patches that it was made of; empty if this is not known,
            and for a class token.
    """

    kept: set[int]
    merged: list[set[int]]


@dataclass
class Trace:
    """The raw log of a prefill.

    Attributes:
        entries: (ids, visual) of the tokens that enter each layer.
        final: computes (ids, visual) of the tokens that leave the last layer; None if these equal the last entry.
        scratch: the scratch dict of the request.
        start: (B, L) long, ids before the first cut; None if cuts are not logged.
        cuts: all cuts in order.
    """

    entries: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    final: Callable[[], tuple[Tensor, Tensor]] | None = None
    scratch: dict[str, Any] = field(default_factory=dict)
    start: Tensor | None = None
    cuts: list[Step] = field(default_factory=list)

    def last(self) -> tuple[Tensor, Tensor]:
        """Return (ids, visual) of the tokens that leave the last layer."""
        return self.entries[-1] if self.final is None else self.final()


class Record:
    """The record of one prefill with images.

    Attributes:
        tokens_in: (B, n_layers) long, number of visual tokens entering each layer.
        tokens_out: (B, n_layers) long, number of visual tokens leaving each layer.
        survival: (B, V) long, number of layers that each visual token leaves.
        kept: list over layers of (B, n) long, original indices of the visual tokens that leave the layer, in
            sequence order; -1 for a merged token, -2 for padding.
        stats: name -> list of B floats (AutoPrune: mi0, mi1, slope, scale).
    """

    def __init__(self, trace: Trace, seen: Seen, method: Method) -> None:
        self._trace, self._seen, self._method = trace, seen, method
        self._entries: list[tuple[Tensor, Tensor]] | None = None

    def _all(self) -> list[tuple[Tensor, Tensor]]:
        if self._entries is None:
            self._entries = [*self._trace.entries, self._trace.last()]
            self._trace.final = None
        return self._entries

    @property
    def tokens_in(self) -> Tensor:
        return torch.stack([v.sum(1).cpu() for _, v in self._trace.entries], 1)

    @property
    def tokens_out(self) -> Tensor:
        return torch.stack([v.sum(1).cpu() for _, v in self._all()[1:]], 1)

    @property
    def kept(self) -> list[Tensor]:
        return [visual_ids(ids.cpu(), visual.cpu()) for ids, visual in self._all()[1:]]

    @property
    def survival(self) -> Tensor:
        """(B, V) long: number of layers that each visual token leaves, by original index.

        0 for a token that does not leave the first layer. A token that was merged into another counts as dropped. V is
        the largest number of visual tokens of a sample.
        """
        ids, visual = self._all()[0]
        width = max(1, *self._seen.n_visual)
        out = torch.zeros(ids.shape[0], width + 1, dtype=torch.long, device=ids.device)
        for layer, (ids, visual) in enumerate(self._all()[1:], 1):
            seen = (visual & (ids >= 0)).to(out.device)
            out.scatter_(1, ids.to(out.device).masked_fill(~seen, width), layer)
        return out[:, :width].cpu()

    @property
    def stats(self) -> dict[str, list[float]]:
        return dict(self._trace.scratch.get("stats", {}))

    # overlays ------------------------------------------------------------------------------------------------
    def views(self, image: Image, sample: int = 0, padded: bool | None = None) -> list[ImageView]:
        """Return the box of each visual token of an image, in pixels of the image.

        Args:
            image: the image before preprocessing.
            sample: number of the sample in the batch.
            padded: whether the image was padded to a square. The default is the checkpoint's setting in package llava,
                and True in transformers' Llava. The processor of transformers' Llava does not pad; pass padded=False
                for it.

        Returns:
            One view; for LLaVA-NeXT two views, the image as a whole and its crops.

        Raises:
            ValueError: if the image is not that of the sample or no PIL image, or if the sample does not have exactly
                one image.
        """
        size = getattr(image, "size", None)
        if not isinstance(size, tuple):  # a path, an array, a tensor
            raise ValueError(f"image={shown(image)}: must be a PIL image, as PIL.Image.open(path) returns")
        return self._seen.views(size, sample, padded)

    def remaining(self, layer: int, sample: int = 0) -> Remaining:
        """Return the visual tokens of a sample that leave a layer, and the patches of its merged tokens.

        Raises:
            ValueError: for a layer that does not exist.
        """
        n_layers = len(self._trace.entries)
        if not isinstance(layer, Integral) or not -n_layers <= layer < n_layers:
            raise ValueError(f"layer={layer!r}: the model has {n_layers} decoder layers; give 0 to {n_layers - 1}")
        ids, visual = (x[sample].tolist() for x in self._all()[1:][layer])
        found = [i for i, seen in zip(ids, visual, strict=True) if seen]
        merged: list[set[int]] = [set() for i in found if i == MERGED]
        if merged and self._trace.start is not None:
            origins = self._origins(layer % n_layers, sample)
            merged = [o for o, i, seen in zip(origins, ids, visual, strict=True) if seen and i == MERGED]
        return Remaining({i for i in found if i >= 0}, merged)

    def _origins(self, layer: int, sample: int) -> list[set[int]]:
        """Return the original indices of the patches in each token of the sequence that leaves a layer."""
        assert self._trace.start is not None
        now = [{i} if i >= 0 else set() for i in self._trace.start[sample].tolist()]
        for step in self._trace.cuts:
            if step.layer > layer:
                break
            index, length = step.index[sample].tolist(), len(now)
            fresh: list[set[int]] = [set() for _ in range(max(index, default=0) + 1 - length)]
            for place, i in zip(fresh, [] if step.ids is None else step.ids[sample].tolist(), strict=False):
                place |= {i} - {MERGED}
            if step.members is not None:
                for position, place in zip(*(x[sample].tolist() for x in step.members()), strict=True):
                    if 0 <= place < len(fresh):
                        fresh[place] |= now[position]
            now = [now[i] if i < length else fresh[i - length] for i in index]
        return now

    def draw(self, image: Image, layer: int = -1, sample: int = 0, padded: bool | None = None) -> Image:
        """Draw the image with all patches dimmed that do not leave a layer.

        Args:
            image: the image before preprocessing.
            layer: decoder layer; -1 is the last one.
            sample: number of the sample in the batch.
            padded: see `views`.

        Returns:
            An image of the same size. For LLaVA-NeXT two images side by side: the image as a whole, and its crops.

        Raises:
            ValueError: see `views` and `remaining`.
        """
        from ..report.overlay import draw_overlay, side_by_side

        views = self.views(image, sample, padded)
        kept, merged = self.remaining(layer, sample)
        return side_by_side([draw_overlay(image, view.boxes, kept, view.first, merged) for view in views])

    def show(
        self,
        image: Image,
        layers: Sequence[int] | None = None,
        sample: int = 0,
        padded: bool | None = None,
        title: str = "",
    ) -> Figure:
        """Draw a contact sheet: `draw` for some layers, and a plot of the visual tokens leaving each layer.

        Args:
            image: the image before preprocessing.
            layers: decoder layers; by default six, from the first to the last.
            sample: number of the sample in the batch.
            padded: see `views`.
            title: text above the sheet, such as question and answer.

        Returns:
            A matplotlib Figure, which notebooks display.

        Raises:
            ValueError: see `draw`; also for more layers than a page holds, or if matplotlib is not installed.
        """
        from ..report.overlay import contact_sheet

        n_layers = len(self._trace.entries)
        if layers is None:
            layers = sorted({round(i * (n_layers - 1) / (PANELS - 1)) for i in range(PANELS)})
        views = self.views(image, sample, padded)
        shown = {layer: self.remaining(layer, sample) for layer in layers}
        entering, leaving = self.tokens_in[sample].tolist(), self.tokens_out[sample].tolist()
        return contact_sheet(image, views, shown, leaving, self.curves(entering[0]), self.describe(sample), title)

    def page(
        self, image: Image, title: str, facts: Mapping[str, str], sample: int = 0, padded: bool | None = None
    ) -> str:
        """Return a self-contained HTML page with the overlay of every layer.

        Args:
            image: the image before preprocessing.
            title: heading, such as the question.
            facts: rows of a table below the heading, such as answers.
            sample: number of the sample in the batch.
            padded: see `views`.

        Raises:
            ValueError: see `views`.
        """
        from ..report.kept_page import kept_page

        views = self.views(image, sample, padded)
        layers = [self.remaining(layer, sample) for layer in range(len(self._trace.entries))]
        entering, leaving = self.tokens_in[sample].tolist(), self.tokens_out[sample].tolist()
        curves, label = self.curves(entering[0]), self.describe(sample)
        return kept_page(image, views, layers, leaving, curves, label, title, facts)

    def curves(self, n_visual: int) -> dict[str, tuple[int, ...]]:
        """Return label -> visual tokens leaving each layer for other questions, for methods whose counts vary."""
        return self._method.curves(n_visual, len(self._trace.entries))

    def describe(self, sample: int = 0) -> str:
        """Return a short label of a sample with its statistics, for legends."""
        stats = self.stats
        if not {"slope", "mi1"} <= stats.keys():
            return "this question"
        return f"this question: slope {stats['slope'][sample]:.2f}, information {stats['mi1'][sample]:.2f} bit"

    def __repr__(self) -> str:
        entering, leaving = self.tokens_in.float(), self.tokens_out.float()
        samples, layers = entering.shape
        return (
            f"Record({samples} sample{'s' * (samples > 1)}, {layers} layers, visual tokens: "
            f"{', '.join(f'{n:.0f}' for n in entering[:, 0])} in, averages {entering.mean():.1f} entering and "
            f"{leaving.mean():.1f} leaving a layer)"
        )


def visual_ids(ids: Tensor, visual: Tensor) -> Tensor:
    """Return (B, n) original indices of the visual tokens in sequence order, padded with PADDING at the end."""
    width = int(visual.sum(1).max()) if visual.numel() else 0
    order = true_first(visual)[:, :width]
    return ids.gather(1, order).masked_fill(~visual.gather(1, order), PADDING)


def original_ids(visual: Tensor) -> Tensor:
    """Return (B, L) long: the index among the sample's visual tokens, TEXT for other positions."""
    return (visual.cumsum(1) - 1).masked_fill(~visual, TEXT)
