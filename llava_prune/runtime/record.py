"""The record of a prefill that users read afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..methods.views import PADDING, TEXT


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
    """The last prefill with images of an attached model.

    Attributes:
        tokens_in: (B, n_layers) long, visual tokens entering each layer.
        tokens_out: (B, n_layers) long, visual tokens leaving each layer.
        kept: list over layers of (B, n) long, original indices of the visual tokens that leave the layer, in
            sequence order; -1 for a merged token, -2 for padding.
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
        return torch.stack([v.sum(1).cpu() for _, v in self._trace.entries], 1)

    @property
    def tokens_out(self) -> Tensor:
        return torch.stack([v.sum(1).cpu() for _, v in self._all()[1:]], 1)

    @property
    def kept(self) -> list[Tensor]:
        return [visual_ids(ids.cpu(), visual.cpu()) for ids, visual in self._all()[1:]]

    @property
    def stats(self) -> dict[str, list[float]]:
        return dict(self._trace.scratch.get("stats", {}))

    def __repr__(self) -> str:
        entering, leaving = self.tokens_in.float(), self.tokens_out.float()
        samples, layers = entering.shape
        return (
            f"Record({samples} sample{'s' * (samples > 1)}, {layers} layers, visual tokens: "
            f"{', '.join(f'{n:.0f}' for n in entering[:, 0])} in, averages {entering.mean():.1f} entering and "
            f"{leaving.mean():.1f} leaving a layer)"
        )


def visual_ids(ids: Tensor, visual: Tensor) -> Tensor:
    """(B, n) original indices of the visual tokens in sequence order, with PADDING at the end."""
    width = int(visual.sum(1).max()) if visual.numel() else 0
    order = (~visual).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    return ids.gather(1, order).masked_fill(~visual.gather(1, order), PADDING)


def original_ids(visual: Tensor) -> Tensor:
    """(B, L) long: index among a sample's visual tokens, TEXT elsewhere."""
    return (visual.cumsum(1) - 1).masked_fill(~visual, TEXT)
