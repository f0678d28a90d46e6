"""The base class of every pruning method."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal

from torch import Tensor

from .types import Cut, Spans, View, VisionCut, VisionView


class Method:
    """One paper. Override the hooks it needs; a method never touches masks, positions, caches or modules.

    Class attributes:
        name: set by `register`.
        paper: full reference.
        positions: "keep" leaves surviving tokens their position ids, "renumber" makes them 0..n-1 after a cut.
        decode: "original" gives a generated token the position it has in the unpruned sequence, "cache" the
            length of each layer's own cache.
        merges: whether cuts may bring in merged rows.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    positions: ClassVar[Literal["keep", "renumber"]] = "keep"
    decode: ClassVar[Literal["original", "cache"]] = "original"

    def vision_rows(self, feature_layer: int) -> dict[int, list[int]]:
        """Attention rows to record in the vision tower, {block: query rows}, row 0 being the class token.

        Args:
            feature_layer: 0-based block whose output is the feature map.
        """
        return {}

    def reduce(self, view: VisionView) -> VisionCut | None:
        """Asked once for the pictures of a request, before the projector. None leaves them alone."""
        return None

    def rows(self, layer: int, spans: Spans) -> Tensor | None:
        """(R,) long: columns whose attention in `layer` `cut` wants to see; None for none."""
        return None

    def cut(self, layer: int, view: View) -> Cut | None:
        """Asked after each decoder layer, and with layer -1 before the first. None leaves the sequence alone."""
        return None

    def plan(self, n_visual: int, n_layers: int) -> list[int] | None:
        """Visual tokens entering each layer for one picture, or None where the data decide."""
        return None

    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters of this instance by argument name."""
        return {p: getattr(self, p) for p in inspect.signature(type(self)).parameters if hasattr(self, p)}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.hyper().items())
        return f"{self.name or type(self).__name__}({inner})"
