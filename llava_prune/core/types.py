"""What the runtime shows a method, and what a method answers.

Letters: B batch, L sequence length now, D width, H heads, R query rows, N pictures or crops, T patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MERGED = -1
"""Original index of a token that was made by merging others."""
FILLER = -2
"""Original index of a masked row that only fills up a batch of unequal lengths."""
TEXT = -3
"""Original index of a row that is not visual."""
ColumnIndex = slice | Tensor
"""Columns of a sequence: a slice with start and stop (nothing is copied), or (R,) long."""


@dataclass(frozen=True)
class Spans:
    """Where the rows of a request stand at one layer.

    Samples are aligned at the right end: padding on the right is moved to the left before a method sees the batch,
    and every cut keeps it so. The text after the picture is always the last ``n_text`` columns, whatever was dropped
    before it.

    Attributes:
        length: L, columns of the sequence now.
        n_text: R, columns after the last visual token (at least 1).
        text: (B, R) bool, which of the last R columns vote for a sample. A sample with nothing after its
            picture votes with its last row; one without a picture has no voter.
        n_visual: visual tokens of each sample that came out of the projector's door, before any cut.
        n_layers: decoder layers of the model.
    """

    length: int
    n_text: int
    text: Tensor
    n_visual: tuple[int, ...]
    n_layers: int

    def text_rows(self) -> slice:
        """The R columns after the picture."""
        return slice(self.length - self.n_text, self.length)

    def last_row(self) -> slice:
        """The last column, the last instruction token of every sample."""
        return slice(self.length - 1, self.length)


@dataclass
class View:
    """A request at the boundary after one decoder layer (or before the first, ``layer == -1``).

    Attributes:
        hidden: (B, L, D) output of the layer.
        visual: (B, L) bool, live visual tokens.
        valid: (B, L) bool, rows that are neither padding nor filler.
        ids: (B, L) long, index among the sample's original visual tokens, or MERGED, FILLER, TEXT.
        probs: (B, H, R, L) float32, softmax attention of the rows the method asked for; None if it asked none.
        spans: see Spans.
        scratch: dict that lives as long as the request; a method keeps its state here, never on itself.
        counts: rows of each sample that are not visual and not padding.
        carried: name -> (B, V) values that `reduce` left, by original visual index; read them with `carry`.
        next_rows: function rows (a slice, or (R,) long) -> (B, H, R, L) float32, the next layer's attention on these
            states.
        rope: cosine and sine of the layer's positions, each (B or 1, L, dh).
        entering: (B, L, D) input of the layer, None before the first.
        middle: (B, L, D) what the layer's MLP was given (the norm after attention), where `Method.middle` asked.
    """

    hidden: Tensor
    visual: Tensor
    valid: Tensor
    ids: Tensor
    probs: Tensor | None
    spans: Spans
    scratch: dict[str, Any]
    counts: tuple[int, ...]
    carried: dict[str, Tensor] = field(default_factory=dict)
    next_rows: Callable[[ColumnIndex], Tensor] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    entering: Tensor | None = None
    middle: Tensor | None = None

    def carry(self, name: str) -> Tensor:
        """(B, L) values that `reduce` left under `name`; 0 on text, filler and merged tokens.

        Raises:
            ValueError: when nothing was left under that name.
        """
        if name not in self.carried:
            raise ValueError(
                f"no {name!r} came from the vision tower (there is {sorted(self.carried) or 'nothing'}): pictures must "
                "be encoded while the method is attached"
            )
        values = self.carried[name]  # (B, V) by original index
        if values.shape[1] == 0:
            return torch.zeros_like(self.visual, dtype=values.dtype)
        picked = values.gather(1, self.ids.clamp(0, values.shape[1] - 1))  # (B, L)
        return picked.masked_fill(~self.visual | (self.ids < 0), 0)


@dataclass(frozen=True)
class Cut:
    """Rows that go on, in output order.

    Attributes:
        index: (B, L') long into the L rows of the view, then the C rows of `merged`.
        merged: (B, C, D) new rows, or None.
        valid: (B, L') bool, False on filler; None when every row is live.
    """

    index: Tensor
    merged: Tensor | None = None
    valid: Tensor | None = None


@dataclass
class VisionView:
    """The pictures of a request between vision tower and projector.

    Attributes:
        features: (N, T, Dv) patch features, class token removed; fewer rows than patches where the method merged
            inside the tower.
        probs: layer -> (N, H, R, 1 + T) float32 softmax rows the method asked for with `vision_rows`.
        keys: layer -> (N, H, 1 + T, dh) key projections of the same layers.
        queries: layer -> (N, H, R, dh) query projections of the rows.
        padding: (N, T) bool, patches that show padding only, or None when the original sizes are unknown.
        grid: (height, width) in patches.
        cls: (N, Dv) the class token's feature, or None when the method asks for no row of the tower.
        groups: (N, T) long, the row of `features` that each patch went into; None where the tower was left alone.
        crops: most crops that this model cuts a picture into, 1 where it sees pictures whole.
        feature_layer: 0-based block whose output the features are.
        carry: name -> (N, T) tensors to meet again in `View.carry`.
    """

    features: Tensor
    probs: dict[int, Tensor]
    keys: dict[int, Tensor]
    padding: Tensor | None
    grid: tuple[int, int]
    queries: dict[int, Tensor] = field(default_factory=dict)
    cls: Tensor | None = None
    groups: Tensor | None = None
    crops: int = 1
    feature_layer: int = -1
    carry: dict[str, Tensor] = field(default_factory=dict)

    def class_attention(self) -> Tensor:
        """(N, T) float32: attention of the class token on each patch in the one recorded block, mean over heads.

        Its attention on itself is left out without renormalising.
        """
        (rows,) = self.probs.values()  # (N, H, 1, 1 + T)
        return rows[:, :, 0, 1:].mean(1)

    def mask(self, name: str, values: Any) -> Tensor:
        """(N, T) bool from what a user gave: T values for all pictures, or N x T, in any shape.

        Raises:
            ValueError: for another number of values, under the argument's name.
        """
        n, t = self.features.shape[:2]
        given = torch.as_tensor(values, device=self.features.device).bool()
        if given.numel() not in (t, n * t):
            raise ValueError(f"{name} has {given.numel()} values; give {t} for all pictures or {n} x {t}")
        return given.reshape(-1, t).expand(n, t)


@dataclass(frozen=True)
class VisionCut:
    """Rows that go on to the language model in place of the patches.

    Attributes:
        live: (N, K) bool; K may differ from the number of patches.
        features: (N, K, Dv) features for the projector, rows not `live` are ignored.
        ids: (N, K) long, the patch each row stands for, MERGED for none. Rows are sent in this order, so patches may be
            reordered or repeated, and newline tokens are not sent. None when row j is patch j: then patches stay
            where the package packs them, among newline tokens, and those it takes away as padding are lost.
        canvas: what becomes of crops when there are ids. The first crop (the whole picture) always comes first. True
            lays the patches of the others on the stitched picture and sends them row by row, then rows without a
            patch: those before the patches of their crop, crop by crop, then those behind. False sends crop after crop.
        counts: live rows of each picture or crop, where the host knows them; otherwise they are read from the device.
    """

    live: Tensor
    features: Tensor
    ids: Tensor | None = None
    canvas: bool = True
    counts: Sequence[int] | None = None


@dataclass(frozen=True)
class Fold:
    """Tokens of a tower block that join others, the class token being row 0.

    Attributes:
        stay: (N, t') long rows that stay, in output order.
        gone: (N, r) long rows that join another, t = t' + r.
        into: (N, r) long places among `stay` that they join.
    """

    stay: Tensor
    gone: Tensor
    into: Tensor
