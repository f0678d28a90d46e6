"""The forward of a pruned language model: stock decoder layers, with cuts between them.

Every layer keeps its own cache length. One mask serves all layers of a stage. Later tokens of a request are the
business of `decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core import fused
from ..core.method import Method
from ..core.select import assemble, take
from ..core.types import MERGED, ColumnIndex, Cut, Spans, View
from .compat import CAUSAL, BaseModelOutputWithPast, DynamicCache, create_causal_mask
from .decode import Decode
from .layout import carry, check_cut, lay_out, moved, moved_ids
from .onednn import few_rows
from .prompt import Prompt, behind, read_prompt
from .request import PENDING, Pending, Record, Request, Rows, Stage, Trace, original_ids, refuse_picture, request_of
from .rows import middle_of, queries_of, text_rows


class State:
    """What an attachment knows: the method, the forward it replaced, the record of the last prefill."""

    def __init__(self, method: Any, stock: Any) -> None:
        self.method = method
        self.stock = stock
        self.last: Record | None = None
        self.check = False
        self.graphs: Any = None
        self.kernels: Any = None

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
    pending, prompt = PENDING.get() if request is None else None, None
    given = input_ids if inputs_embeds is None else inputs_embeds
    if request is not None or pending is not None:
        _refuse_mask(attention_mask)
    if pending is not None:
        PENDING.set(None)
        if given is not None:
            prompt = read_prompt(pending, *given.shape[:2], given.device, attention_mask, position_ids)
        if prompt is not None and not any(prompt.n_visual):
            pending = None  # pictures, but no place for them
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
    _refuse(kwargs, past_key_values, past if pending is not None else 0)
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
        decode = Decode(lm, request, past_key_values, attention_mask, hidden)
        out = None if state.graphs is None else state.graphs.step(decode, past_key_values, hidden, kwargs)
        hidden = decode.run(hidden, kwargs) if out is None else out
    else:
        assert pending is not None and prompt is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=lm.config)
        state.last = None  # frees what the record before holds
        made = None
        with fused.use(state.kernels, hidden.device):
            if state.graphs is not None:
                made = state.graphs.run(lm, state, pending, prompt, past_key_values, hidden, kwargs)
            if made is None:
                prefill = Prefill(lm, state, pending, prompt, past_key_values, attention_mask, hidden)
                made = prefill.run(kwargs), prefill.request, prefill.trace
        hidden, request, trace = made
        state.last = Record(trace)
        if past_key_values is not None:
            past_key_values._llava_prune = request
    return BaseModelOutputWithPast(last_hidden_state=lm.norm(hidden), past_key_values=past_key_values)


def _refuse_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("a pruned model takes a 2-D attention mask (batch, length); drop custom 4-D masks")


def _refuse(kwargs: dict[str, Any], cache: Any, past: int) -> None:
    """Errors for what a sequence of changing length cannot do, before anything runs."""
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None):
            raise ValueError(f"{name}=True: pruned layers differ in length; detach first, or read handle.last")
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"{type(cache).__name__} has one length for all layers; use cache_implementation='dynamic'")
    if past:
        refuse_picture(past)


class Prefill:
    """A prompt on its way through the layers. `run`, or `begin`, then `layer` and `decide` for each, then `end`."""

    def __init__(
        self, lm: Any, state: State, pending: Pending, prompt: Prompt, cache: Any, mask: Tensor | None, hidden: Tensor
    ) -> None:
        self.lm, self.state, self.method, self.cache = lm, state, state.method, cache
        self.hidden, length = hidden, hidden.shape[1]
        self.numbers: Tensor | None = None  # positions of sequences without filler, see _renumber
        self.turns: tuple[Tensor, Tensor] | None = None  # their cosine and sine
        self.dense = False  # whether `positions` are the first of `numbers`
        self.rope: tuple[Tensor, Tensor]
        self.mask: Any
        self.visual, self.valid, self.positions = prompt.visual, prompt.valid, prompt.positions
        self.n_visual, self.counts, self.n_text = prompt.n_visual, prompt.counts, prompt.n_text
        self.ids = original_ids(self.visual)
        self.unmasked: Tensor | None = None  # (1, L) bool, where masked rows stand before the prompt
        if prompt.pad is not None:
            self.unmasked = torch.arange(length, device=hidden.device) >= prompt.pad
        self.mask2d = mask = None if prompt.full else mask  # without padding backends may take their causal path
        self.causal: Tensor | None = None
        self.carried = carry(pending, self.visual, prompt.source, max(self.n_visual))
        self.trace = Trace()
        base = (self.positions.masked_fill(~self.valid, -1)).amax(1, keepdim=True) + 1
        self.origin = base - self.valid.sum(1, keepdim=True)  # (B, 1) where numbering begins: padding, as a rule
        self.request = Request([Stage(0, mask, length)], length, base[None])
        if pending.cut is not None:
            self._replace(pending.cut, prompt)
        elif prompt.gaps and type(self.method).cut is not Method.cut:
            self._drop(self.visual, self.n_visual)
        more = (n - b for n, b in zip(self.n_visual, prompt.n_visual, strict=True))  # PruMerge+ can send one row more
        self.table = lm.rotary_emb(hidden, torch.arange(prompt.top + max(0, *more), device=hidden.device)[None])
        self.text = self._voters()

    def _voters(self) -> Tensor:
        """(B, R) bool, see Spans.text; samples are aligned at the right end by now."""
        text = behind(self.visual, self.valid)[:, -self.n_text :]
        alone = self.visual.any(1) & ~text.any(1)
        text[:, -1] |= alone
        return text

    def _drop(self, live: Tensor, left: tuple[int, ...]) -> None:
        """Visual rows that are not `live` leave before the first layer, `left` stay; the rest is right-aligned."""
        lengths = [c + n for c, n in zip(self.counts, left, strict=True)]
        self._apply(-1, assemble(self.visual & live, self.visual, self.valid, lengths))
        self.n_visual = left

    def _replace(self, cut: Rows, prompt: Prompt) -> None:
        """The vision side's rows take the places of the pictures."""
        if prompt.source is None:
            raise ValueError("a vision-side method needs to know which patch is behind which token")
        embeds = cut.embeds.to(self.hidden.device, self.hidden.dtype).flatten(0, 1)
        if prompt.row is not None and prompt.live is not None:
            self.hidden = torch.where((prompt.row >= 0)[..., None], embeds[prompt.row.clamp(min=0)], self.hidden)
            self._drop(prompt.live, prompt.left)
        else:
            rows = lay_out(cut, self.visual, prompt.source, prompt.columns, prompt.ids)
            lengths = [c + n for c, n in zip(self.counts, rows.counts, strict=True)]
            none, places = torch.zeros_like(self.visual), self._places(rows.ids)
            given = embeds[rows.index]  # (B, C, D)
            closed = assemble(none, self.visual, self.valid, lengths, given, rows.counts, rows.at)
            self._apply(-1, closed, rows.ids, places)
            self.n_visual = tuple(rows.counts)
        if self.method.vision_positions == "renumber":
            self._renumber()
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
        """What `create_causal_mask` makes; where a backend takes that as it is, without its look at the values."""
        backend, live = self.lm.config._attn_implementation, self._live()
        if backend in CAUSAL and live is None:
            return None
        if backend == "flash_attention_2":
            return live
        if backend == "sdpa":
            assert live is not None
            n = live.shape[1]
            if self.causal is None or self.causal.shape[0] < n:
                self.causal = torch.ones(n, n, dtype=torch.bool, device=live.device).tril()
            return self.causal[:n, :n] & live[:, None, None]
        return create_causal_mask(
            config=self.lm.config,
            inputs_embeds=self.hidden,
            attention_mask=live,
            past_key_values=self.cache,
            position_ids=None,
            layer_idx=layer,
        )

    def _live(self) -> Tensor | None:
        """(B, L) bool rows that may be attended to, None for all."""
        if self.unmasked is not None:
            return self.unmasked[:, : self.visual.shape[1]]  # the masked rows are the first and stay
        return None if self.mask2d is None else self.valid

    def _rope(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rows, (B, L, dh) each, from a table made once."""
        if not self.dense:
            return self._turn(self.positions)
        assert self.numbers is not None
        length = self.positions.shape[1]
        if self.turns is None or self.turns[0].shape[1] < length:
            self.turns = self._turn(self.numbers)
        return self.turns[0][:, :length], self.turns[1][:, :length]

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.table
        return cos[0][positions], sin[0][positions]

    def _renumber(self) -> None:
        """Positions without gaps. Where no row is filler they are the first of a sequence that is made once."""
        self.dense, length = self.mask2d is None, self.valid.shape[1]
        if not self.dense:
            self.positions = (self.valid.cumsum(1) - 1 + self.origin).clamp(min=0)
            return
        if self.numbers is None or self.numbers.shape[1] < length:
            self.numbers = (torch.arange(length, device=self.valid.device) + self.origin).clamp(min=0)
        self.positions = self.numbers[:, :length]

    def _apply(self, layer: int, cut: Cut, ids: Tensor | None = None, places: Tensor | None = None) -> None:
        """Gather every per-row tensor; the new stage begins at layer + 1.

        Merged rows get `ids` (B, C) and positions `places` (B, C), else MERGED and the last visual position.
        """
        if self.state.check:
            check_cut(cut, self.visual, self.valid)
        rows = self.hidden if cut.merged is None else torch.cat([self.hidden, cut.merged], 1)
        self.hidden = take(rows, cut.index)
        if self.method.positions == "keep":
            last = self.positions.masked_fill(~self.visual, 0).amax(1, keepdim=True)
            self.positions, self.dense = moved(self.positions, cut, last if places is None else places), False
        self.ids, self.visual = moved_ids(self.ids, cut, MERGED if ids is None else ids)
        length = cut.index.shape[1]
        if cut.valid is not None:
            self.valid = cut.valid
        elif self.mask2d is None and length <= self.valid.shape[1]:
            self.valid = self.valid[:, :length]  # no filler before, none now
        else:
            self.valid = torch.ones_like(self.visual)
        self.mask2d = cut.valid
        if self.method.positions == "renumber":
            self._renumber()
        stage = Stage(layer + 1, self.mask2d, length)
        self.request.stages = [s for s in self.request.stages if s.first != layer + 1] + [stage]

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """(B, L', D) states behind the last layer."""
        self.begin()
        for i in range(len(self.lm.layers)):
            view = self.layer(i, kwargs)
            if view is not None:
                settle(self.method, i, view)
                self.decide(i, view)
            del view  # its tensors need not live through the next layer
        return self.end()

    def begin(self) -> None:
        """The cut before the first layer."""
        before = self.method.cut(-1, self._view(None, None))
        if before is not None:
            self._apply(-1, before)
        self.rope, self.mask = self._rope(), self._mask(0)

    def layer(self, i: int, kwargs: dict[str, Any]) -> View | None:
        """Run one layer; what its cut is shown, None for the last."""
        layer, layers = self.lm.layers[i], self.lm.layers
        self.trace.entries.append((self.ids, self.visual))
        entering, rope = self.hidden, self.rope
        spans = self._spans()
        wanted = self.method.rows(i, spans)
        short = few_rows(entering) if entering.shape[1] < self.request.length else nullcontext()
        with middle_of(layer, self.method.middle(i, spans)) as middle, queries_of(layer, wanted) as queries, short:
            self.hidden = layer(
                entering,
                attention_mask=self.mask,
                position_embeddings=rope,
                position_ids=None,
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                **kwargs,
            )
        live = self._live()
        score = _Scores(layer, entering, rope, wanted, live, self._keys(i), queries)
        if i + 1 == len(layers):
            if type(self.method).cut is not Method.cut:
                self.trace.final = _Final(self.method, i, score, self._view(None, None))
            return None
        nxt = _Scores(layers[i + 1], self.hidden, rope, None, live)
        return self._view(score(), nxt.rows, rope, entering, middle[0] if middle else None)

    def decide(self, i: int, view: View) -> None:
        """The cut after a layer; what the method asked for is settled."""
        cut = self.method.cut(i, view)
        if cut is not None:
            self._apply(i, cut)
            self.rope, self.mask = self._rope(), self._mask(i + 1)

    def end(self) -> Tensor:
        """(B, L', D) states; positions of new tokens are settled."""
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


def settle(method: Method, layer: int, view: View) -> None:
    """Read what a method asks for before the cut of a layer, and leave what follows from it in the scratch."""
    asked = method.ask(layer, view)
    if asked is not None:
        view.scratch["settled"] = method.settle(layer, asked.tolist(), view)


class _Scores:
    """Attention rows of one layer, computed when called; `keys` and `queries` are what the layer made of its input."""

    def __init__(
        self,
        layer: Any,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        wanted: ColumnIndex | None,
        valid: Tensor | None,
        keys: Tensor | None = None,
        queries: Sequence[Tensor] = (),
    ) -> None:
        self.layer, self.hidden, self.rope, self.wanted, self.valid = layer, hidden, rope, wanted, valid
        self.keys, self.queries = keys, queries

    def rows(self, rows: ColumnIndex) -> Tensor:
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
        settle(self.method, self.layer, view)
        cut = self.method.cut(self.layer, view)
        if cut is None:
            return view.ids, view.visual
        return moved_ids(view.ids, cut)
