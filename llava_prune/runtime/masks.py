"""Attention masks and rotary embeddings of a prefill, computed once for all layers that share a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compat import CACHE, CAUSAL, create_causal_mask
from .sequence import TokenSequence


class Rotary:
    """Cosine and sine of position ids, looked up in a table that is computed once.

    Args:
        lm: the language model.
        hidden: (B, L, D) input embeddings, which give device and dtype.
        top: number of position ids in the table.
    """

    def __init__(self, lm: Any, hidden: Tensor, top: int) -> None:
        self.table: tuple[Tensor, Tensor] = lm.rotary_emb(hidden, torch.arange(top, device=hidden.device)[None])
        self.numbered: tuple[Tensor, Tensor] | None = None  # cosine and sine of `TokenSequence.numbers`

    def of(self, sequence: TokenSequence) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, (B, L, dh) each, on the device of the sequence."""
        device = sequence.positions.device
        if self.table[0].device != device:
            self.table, self.numbered = (self.table[0].to(device), self.table[1].to(device)), None
        if not sequence.consecutive:
            return self._look_up(sequence.positions)
        assert sequence.numbers is not None
        length = sequence.positions.shape[1]
        if self.numbered is None or self.numbered[0].shape[1] < length:
            self.numbered = self._look_up(sequence.numbers)
        return self.numbered[0][:, :length], self.numbered[1][:, :length]

    def _look_up(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.table
        return cos[0][positions], sin[0][positions]


class Masks:
    """The attention masks that decoder layers take.

    Args:
        config: the config of the language model.
        before: (1, L) bool, False on masked positions before the prompt (see `prompt.padded`); None if there are none.
    """

    def __init__(self, config: Any, before: Tensor | None = None) -> None:
        self.config, self.before = config, before
        self.causal: Tensor | None = None

    def attended(self, sequence: TokenSequence) -> Tensor | None:
        """Return (B, L) bool, the positions that may be attended to, or None for all positions."""
        if self.before is not None:
            return self.before[:, : sequence.visual.shape[1]]  # the masked positions come first, and cuts keep them
        return None if sequence.padding is None else sequence.valid

    def of(self, sequence: TokenSequence, layer: int, cache: Any) -> Any:
        """Return the mask that `create_causal_mask` makes for a layer.

        For sdpa and flash attention the mask is made here, without transformers' inspection of its values.
        """
        backend, live = self.config._attn_implementation, self.attended(sequence)
        if backend in CAUSAL and live is None:
            return None
        if backend == "flash_attention_2":
            return live
        if backend == "sdpa":
            assert live is not None
            n = live.shape[1]
            if self.causal is None or self.causal.shape[0] < n or self.causal.device != live.device:
                self.causal = torch.ones(n, n, dtype=torch.bool, device=live.device).tril()
            return self.causal[:n, :n] & live[:, None, None]
        return create_causal_mask(
            config=self.config,
            inputs_embeds=sequence.hidden,
            attention_mask=live,
            **{CACHE: cache},
            position_ids=None,
            layer_idx=layer,
        )
