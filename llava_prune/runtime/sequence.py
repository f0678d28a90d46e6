"""The tokens of a prefill at one layer: states, masks, position ids and original indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..methods.views import MERGED
from ..ops.selection import Cut, take, true_first
from .layout import gather_by_cut, gather_ids_by_cut
from .prompt import Prompt
from .record import original_ids


@dataclass
class TokenSequence:
    """B samples of L tokens; right-aligned after the first cut.

    Attributes:
        hidden: (B, L, D) hidden states.
        visual: (B, L) bool, visual tokens.
        valid: (B, L) bool, False on padding.
        ids: (B, L) long, see `View.ids`.
        positions: (B, L) long, position ids.
        padding: (B, L) mask if some position is padding; None if none is, so that backends can run causally without a
            mask.
        rule: how a cut changes position ids, see `Method.positions`.
        start: (B, 1) long, the first position of the renumbered position ids; usually the number of padding positions
            on the left.
        numbers: (B, n) long, consecutive position ids from `start` on, computed once for the longest sequence without
            padding.
        consecutive: whether `positions` is the beginning of `numbers`.
    """

    hidden: Tensor
    visual: Tensor
    valid: Tensor
    ids: Tensor
    positions: Tensor
    padding: Tensor | None
    rule: Literal["keep", "renumber"]
    start: Tensor
    numbers: Tensor | None = None
    consecutive: bool = False

    @staticmethod
    def of(prompt: Prompt, hidden: Tensor, mask: Tensor | None, rule: Literal["keep", "renumber"]) -> TokenSequence:
        """Return the sequence that enters the language model."""
        end = (prompt.positions.masked_fill(~prompt.valid, -1)).amax(1, keepdim=True) + 1  # (B, 1)
        return TokenSequence(
            hidden=hidden,
            visual=prompt.visual,
            valid=prompt.valid,
            ids=original_ids(prompt.visual),
            positions=prompt.positions,
            padding=None if prompt.full else mask,
            rule=rule,
            start=end - prompt.valid.sum(1, keepdim=True),
        )

    @property
    def length(self) -> int:
        """L, the number of token positions."""
        return self.hidden.shape[1]

    def to(self, device: torch.device) -> None:
        """Move all tensors to the device of the next layer of a model that is spread over several devices."""
        if self.visual.device == device:
            return
        for name in ("hidden", "visual", "valid", "ids", "positions", "padding", "start", "numbers"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))

    def apply(self, cut: Cut, ids: Tensor | None = None, places: Tensor | None = None) -> None:
        """Gather all tensors by a cut.

        Merged tokens get the original indices `ids` (B, C) and the position ids `places` (B, C); the defaults are
        MERGED and the position id of the last visual token.
        """
        states = self.hidden if cut.merged is None else torch.cat([self.hidden, cut.merged], 1)
        self.hidden = take(states, cut.index)
        if self.rule == "keep":
            last = self.positions.masked_fill(~self.visual, 0).amax(1, keepdim=True)
            self.positions = gather_by_cut(self.positions, cut, last if places is None else places)
            self.consecutive = False
        self.ids, self.visual = gather_ids_by_cut(self.ids, cut, MERGED if ids is None else ids)
        length = cut.index.shape[1]
        if cut.valid is not None:
            self.valid = cut.valid
        elif self.padding is None and length <= self.valid.shape[1]:
            self.valid = self.valid[:, :length]  # there was no padding before the cut
        else:
            self.valid = torch.ones_like(self.visual)
        self.padding = cut.valid
        if self.rule == "renumber":
            self.renumber()

    def renumber(self) -> None:
        """Replace the position ids by consecutive ones; without padding, they are a slice of `numbers`."""
        self.consecutive, length = self.padding is None, self.valid.shape[1]
        if not self.consecutive:
            self.positions = (self.valid.cumsum(1) - 1 + self.start).clamp(min=0)
            return
        if self.numbers is None or self.numbers.shape[1] < length:
            self.numbers = (torch.arange(length, device=self.valid.device) + self.start).clamp(min=0)
        self.positions = self.numbers[:, :length]

    def patch_positions(self, ids: Tensor) -> Tensor:
        """Return (B, C) position ids of the patches `ids`; tokens without a patch get that of the last visual token."""
        order = true_first(self.visual)
        last = self.positions.masked_fill(~self.visual, 0).amax(1, keepdim=True)
        there = self.positions.gather(1, order.gather(1, ids.clamp(0, order.shape[1] - 1)))
        return torch.where(ids >= 0, there, last)
