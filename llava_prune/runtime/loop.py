"""The forward of a pruned language model: stock decoder layers, with cuts between them.

Every layer keeps its own cache length. One mask serves all layers of a stage. Later tokens of a request are the
business of `decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from ..core.select import assemble
from ..core.types import FILLER, MERGED, Cut, Spans, View
from .compat import BaseModelOutputWithPast, DynamicCache, create_causal_mask
from .decode import Decode
from .layout import carry, check_cut, in_place, lay_out
from .request import PENDING, Pending, Record, Request, Rows, Stage, Trace, original_ids, refuse_picture, request_of
from .rows import middle_of, queries_of, text_rows

CAUSAL = ("sdpa", "flash_attention_2")
"""Backends that are causal by themselves when no mask is given."""


class State:
    """What an attachment knows: the method, the forward it replaced, the record of the last prefill."""

    def __init__(self, method: Any, stock: Any) -> None:
        self.method = method
        self.stock = stock
        self.last: Record | None = None
        self.check = False

    def base(self, lm: Any) -> Any:
        """The forward to fall back on for requests without visual tokens."""
        return self.stock if self.stock is not None else type(lm).forward.__get__(lm)


def pruned_forward(
    lm: Any,
    state: State,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """LlamaModel.forward with the method's cuts; requests without pictures go to the stock forward."""
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    request = request_of(past_key_values)
    pending = PENDING.get() if request is None else None
    if pending is not None:
        PENDING.set(None)
    if request is None and pending is None:
        if not past:
            state.last = None  # a prefill without pictures leaves no record
        return state.base(lm)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
    _refuse(kwargs, attention_mask, past_key_values, past if pending is not None else 0)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    hidden = lm.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    use_cache = lm.config.use_cache if use_cache is None else use_cache
    kwargs.pop("return_dict", None)
    kwargs.pop("cache_position", None)
    if request is not None:
        if hidden.shape[1] > 1 and PENDING.get() is not None:
            PENDING.set(None)
            refuse_picture(past)
        hidden = Decode(lm, request, past_key_values, attention_mask, hidden).run(hidden, kwargs)
    else:
        assert pending is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=lm.config)
        state.last = None  # frees what the record before holds
        prefill = _Prefill(lm, state, pending, past_key_values, attention_mask, position_ids, hidden)
        hidden = prefill.run(kwargs)
        state.last = Record(prefill.trace)
        if past_key_values is not None:
            past_key_values._llava_prune = prefill.request
    return BaseModelOutputWithPast(last_hidden_state=lm.norm(hidden), past_key_values=past_key_values)


def _refuse(kwargs: dict[str, Any], mask: Any, cache: Any, past: int) -> None:
    """Errors for what a sequence of changing length cannot do, before anything runs."""
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None):
            raise ValueError(f"{name}=True: pruned layers differ in length; detach first, or read handle.last")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("a pruned model takes a 2-D attention mask (batch, length); drop custom 4-D masks")
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"{type(cache).__name__} has one length for all layers; use cache_implementation='dynamic'")
    if past:
        refuse_picture(past)


class _Prefill:
    def __init__(
        self,
        lm: Any,
        state: State,
        pending: Pending,
        cache: Any,
        mask: Tensor | None,
        position_ids: Tensor | None,
        hidden: Tensor,
    ) -> None:
        self.lm, self.state, self.method, self.cache = lm, state, state.method, cache
        batch, length = hidden.shape[:2]
        device = hidden.device
        visual = pending.visual.to(device)
        source = None if pending.source is None else pending.source.to(device)
        if visual.shape[0] != batch and batch % visual.shape[0] == 0:  # beams repeat the spliced embeddings
            times = batch // visual.shape[0]
            visual = visual.repeat_interleave(times, 0)
            source = None if source is None else source.repeat_interleave(times, 0)
        if visual.shape != (batch, length):
            raise ValueError(f"pictures were spliced into {tuple(visual.shape)} tokens, not {(batch, length)}")
        self.hidden = hidden
        self.valid = torch.ones_like(visual) if mask is None else mask[:, -length:].to(device).bool()
        self.visual = visual & self.valid
        self.mask2d: Tensor | None = mask
        self.ids = original_ids(self.visual)
        if position_ids is None:  # as the stock forward numbers them, padding included
            position_ids = torch.arange(length, device=device)[None]
        self.positions = position_ids.to(device).long().expand(batch, -1)
        gaps, top = self._read_lengths()
        if all(n + c == length for n, c in zip(self.n_visual, self.counts, strict=True)):
            self.mask2d = mask = None  # no padding: backends may take their causal fast path
        cut, before = pending.cut, self.n_visual
        self.carried = carry(pending, self.visual, source, max(self.n_visual))
        self.trace = Trace()
        base = (self.positions.masked_fill(~self.valid, -1)).amax(1, keepdim=True) + 1
        self.origin = base - self.valid.sum(1, keepdim=True)  # (B, 1) where numbering begins: padding, as a rule
        self.request = Request([Stage(0, mask, length)], length, base[None])
        if cut is not None:
            self._replace(cut, source)
        elif gaps and type(self.method).cut is not Method.cut:
            self._drop(self.visual)
        top += max(0, *(n - b for n, b in zip(self.n_visual, before, strict=True)))  # PruMerge+ can send one row more
        self.table = lm.rotary_emb(hidden, torch.arange(top, device=device)[None])
        self.text = self._voters()

    def _read_lengths(self) -> tuple[bool, int]:
        """Host integers of the request, in one read: visual tokens and other live rows of each sample, text after.

        Returns:
            (whether padding stands anywhere but at the left end, the largest position + 1).
        """
        after = self._after().sum(1)
        gap = (self.valid[:, :-1] & ~self.valid[:, 1:]).any(1)
        top = self.positions.amax(1) + 1
        table = torch.stack([self.visual.sum(1), (self.valid & ~self.visual).sum(1), after, gap, top], 1).tolist()
        self.n_visual = tuple(row[0] for row in table)
        self.counts = tuple(row[1] for row in table)
        self.n_text = max(1, *(row[2] for row in table))
        return any(row[3] for row in table), max(row[4] for row in table)

    def _after(self) -> Tensor:
        """(B, L) bool: live rows after the last visual token of a sample that has one."""
        places = torch.arange(1, self.visual.shape[1] + 1, device=self.visual.device)
        last = (self.visual * places).amax(1, keepdim=True)  # (B, 1), 1-based, 0 without picture
        return self.valid & (places > last) & (last > 0)

    def _voters(self) -> Tensor:
        """(B, R) bool, see Spans.text; samples are aligned at the right end by now."""
        text = self._after()[:, -self.n_text :]
        alone = self.visual.any(1) & ~text.any(1)
        text[:, -1] |= alone
        return text

    def _drop(self, live: Tensor) -> None:
        """Visual rows that are not `live` leave before the first layer; the rest is right-aligned."""
        kept = self.visual & live
        left = kept.sum(1).tolist()
        cut = assemble(kept, self.visual, self.valid, [c + n for c, n in zip(self.counts, left, strict=True)])
        self._apply(-1, cut)
        self.n_visual = tuple(left)

    def _replace(self, cut: Rows, source: Tensor | None) -> None:
        """The vision side's rows take the places of the pictures."""
        if source is None:
            raise ValueError("a vision-side method needs to know which patch is behind which token")
        embeds = cut.embeds.to(self.hidden.device, self.hidden.dtype).flatten(0, 1)
        if cut.packed:
            row, live = in_place(cut, source)
            self.hidden = torch.where((row >= 0)[..., None], embeds[row.clamp(min=0)], self.hidden)
            self._drop(live)
        else:
            rows = lay_out(cut, self.visual, source)
            lengths = [c + n for c, n in zip(self.counts, rows.counts, strict=True)]
            none, places = torch.zeros_like(self.visual), self._places(rows.ids)
            given = embeds[rows.index]  # (B, C, D)
            closed = assemble(none, self.visual, self.valid, lengths, given, rows.counts, rows.at)
            self._apply(-1, closed, rows.ids, places)
            self.n_visual = tuple(rows.counts)
        if self.method.vision_positions == "renumber":
            self.positions = (self.valid.cumsum(1) - 1 + self.origin).clamp(min=0)
            self.request.starts = (self.valid.sum(1, keepdim=True) + self.origin)[None]

    def _places(self, ids: Tensor) -> Tensor:
        """(B, C) positions of the patches `ids`; a row without one has that of the picture's last token."""
        order = (~self.visual).to(torch.int8).sort(dim=1, stable=True).indices
        last = self.positions.masked_fill(~self.visual, 0).amax(1, keepdim=True)
        there = self.positions.gather(1, order.gather(1, ids.clamp(0, order.shape[1] - 1)))
        return torch.where(ids >= 0, there, last)

    def _spans(self) -> Spans:
        layers = len(self.lm.layers)
        return Spans(self.hidden.shape[1], self.n_text, self.text, self.n_visual, layers)

    def _view(self, probs: Tensor | None, next_rows: Any, *layer: Any) -> View:
        return View(
            self.hidden,
            self.visual,
            self.valid,
            self.ids,
            probs,
            self._spans(),
            self.trace.scratch,
            self.counts,
            self.carried,
            next_rows,
            *layer,
        )

    def _mask(self, layer: int) -> Any:
        if self.mask2d is None and self.lm.config._attn_implementation in CAUSAL:
            return None
        return create_causal_mask(
            config=self.lm.config,
            inputs_embeds=self.hidden,
            attention_mask=self.mask2d,
            past_key_values=self.cache,
            position_ids=None,
            layer_idx=layer,
        )

    def _rope(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rows, (B, L, dh) each, from a table made once."""
        cos, sin = self.table
        return cos[0][self.positions], sin[0][self.positions]

    def _apply(self, layer: int, cut: Cut, ids: Tensor | None = None, places: Tensor | None = None) -> None:
        """Gather every per-row tensor; the new stage begins at layer + 1.

        Merged rows get `ids` (B, C) and positions `places` (B, C), else MERGED and the last visual position.
        """
        batch, length = self.visual.shape
        extra = 0 if cut.merged is None else cut.merged.shape[1]
        if self.state.check:
            check_cut(cut, self.visual, self.valid)

        def move(rows: Tensor, fill: Any) -> Tensor:
            if extra:
                tail = fill if isinstance(fill, Tensor) else rows.new_full((batch, 1), fill)
                rows = torch.cat([rows, tail.expand(batch, extra)], 1)
            return rows.gather(1, cut.index)

        rows = self.hidden if cut.merged is None else torch.cat([self.hidden, cut.merged], 1)
        self.hidden = rows.gather(1, cut.index[..., None].expand(-1, -1, rows.shape[2]))
        if self.method.positions == "keep":
            last = self.positions.masked_fill(~self.visual, 0).amax(1, keepdim=True)
            self.positions = move(self.positions, last if places is None else places)
        self.visual, self.ids = move(self.visual, True), move(self.ids, MERGED if ids is None else ids)
        if cut.valid is None:
            self.valid, self.mask2d = torch.ones_like(self.visual), None
        else:
            self.valid = self.mask2d = cut.valid
            self.visual = self.visual & cut.valid
            self.ids = self.ids.masked_fill(~cut.valid, FILLER)
        if self.method.positions == "renumber":
            self.positions = (self.valid.cumsum(1) - 1 + self.origin).clamp(min=0)
        stage = Stage(layer + 1, self.mask2d, cut.index.shape[1])
        self.request.stages = [s for s in self.request.stages if s.first != layer + 1] + [stage]

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        layers = self.lm.layers
        before = self.method.cut(-1, self._view(None, None))
        if before is not None:
            self._apply(-1, before)
        rope, mask = self._rope(), self._mask(0)
        for i, layer in enumerate(layers):
            self.trace.entries.append((self.ids, self.visual))
            entering = self.hidden
            spans = self._spans()
            wanted = self.method.rows(i, spans)
            with middle_of(layer, self.method.middle(i, spans)) as middle, queries_of(layer, wanted) as queries:
                self.hidden = layer(
                    entering,
                    attention_mask=mask,
                    position_embeddings=rope,
                    position_ids=None,
                    past_key_values=self.cache,
                    use_cache=self.cache is not None,
                    **kwargs,
                )
            valid = None if self.mask2d is None else self.valid
            score = _Scores(layer, entering, rope, wanted, valid, self._keys(i), queries)
            if i + 1 == len(layers):
                if type(self.method).cut is not Method.cut:
                    self.trace.final = _Final(self.method, i, score, self._view(None, None))
                break
            seen = rope, entering, middle[0] if middle else None
            nxt = _Scores(layers[i + 1], self.hidden, rope, None, valid)
            cut = self.method.cut(i, self._view(score(), nxt.rows, *seen))
            if cut is not None:
                self._apply(i, cut)
                rope, mask = self._rope(), self._mask(i + 1)
        if self.method.decode == "cache":
            self.request.starts = torch.stack([self._cached(s) for s in self.request.stages])
        return self.hidden

    def _cached(self, stage: Stage) -> Tensor:
        """(B, 1) position after the live rows that the layers of a stage have cached."""
        if stage.valid is None:
            return self.origin + stage.length
        return self.origin + stage.valid.long().sum(1, keepdim=True)

    def _keys(self, layer: int) -> Tensor | None:
        """Keys the layer just cached, when the cache shows them as a tensor."""
        kept = getattr(self.cache, "layers", None)
        keys = getattr(kept[layer], "keys", None) if kept is not None and len(kept) > layer else None
        fits = isinstance(keys, Tensor) and keys.shape[2:3] == self.visual.shape[1:]
        return keys if fits and keys.device == self.hidden.device else None  # an offloaded cache has them elsewhere


class _Scores:
    """Attention rows of one layer, computed when called; `keys` and `queries` are what the layer made of its input."""

    def __init__(
        self,
        layer: Any,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        wanted: Tensor | None,
        valid: Tensor | None,
        keys: Tensor | None = None,
        queries: Sequence[Tensor] = (),
    ) -> None:
        self.layer, self.hidden, self.rope, self.wanted, self.valid = layer, hidden, rope, wanted, valid
        self.keys, self.queries = keys, queries

    def rows(self, rows: Tensor) -> Tensor:
        return text_rows(self.layer, self.hidden, self.rope, rows, self.valid, self.keys)

    def __call__(self) -> Tensor | None:
        if self.wanted is None:
            return None
        queries = self.queries[0] if self.queries else None
        return text_rows(self.layer, self.hidden, self.rope, self.wanted, self.valid, self.keys, queries)


class _Final:
    """The cut after the last layer. It changes no output, so it is computed only when its record is read."""

    def __init__(self, method: Any, layer: int, score: _Scores, view: View) -> None:
        self.method, self.layer, self.score, self.view = method, layer, score, view

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        view = self.view
        view.probs = self.score()
        cut = self.method.cut(self.layer, view)
        if cut is None:
            return view.ids, view.visual
        extra = 0 if cut.merged is None else cut.merged.shape[1]
        batch = view.ids.shape[0]
        ids = torch.cat([view.ids, view.ids.new_full((batch, extra), MERGED)], 1).gather(1, cut.index)
        visual = torch.cat([view.visual, view.visual.new_ones(batch, extra)], 1).gather(1, cut.index)
        return ids, visual if cut.valid is None else visual & cut.valid
