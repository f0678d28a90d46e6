"""The prefill of a pruned language model: stock decoder layers with cuts between them.

Every layer keeps its own cache length. One attention mask serves all layers that share a sequence. Decoding is in
`decode.py`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method, prunes_inside
from ..methods.views import Spans, View
from ..ops.selection import Cut, Positions, assemble
from .answers import check_form, check_positions
from .attention import catch_mlp_input, catch_queries, decoder_attention, decoder_keys, head_group
from .compat import CACHE
from .decode import DecodeState, Stage
from .layout import check_cut, gather_ids_by_cut, patch_table, place_tokens, vision_members
from .masks import Masks, Rotary
from .patching import execution_device
from .prompt import Prompt, after_image
from .record import Step, Trace
from .sequence import TokenSequence
from .state import VisionTokens


class Prefill:
    """The prefill of one prompt.

    Call `run`; or call `begin`, then `layer` and `prune` for each layer, then `end`.

    Attributes:
        sequence: the current tokens.
        decode: the state that decoding needs.
        trace: the log from which the record is made.
        n_visual, n_other: numbers of visual and of other tokens of each sample that enter the first layer.

    Args:
        lm: the language model.
        method: the pruning method.
        prompt: the prompt.
        cache: the KV cache, or None.
        mask: (B, L) attention mask, or None.
        hidden: (B, L, D) input embeddings.
        kernels: see `View.kernels`.
        check: verify every cut on the host.
    """

    def __init__(
        self,
        lm: Any,
        method: Method,
        prompt: Prompt,
        cache: Any,
        mask: Tensor | None,
        hidden: Tensor,
        kernels: Any = None,
        check: bool = False,
    ) -> None:
        self.lm, self.method, self.cache, self.kernels, self.check = lm, method, cache, kernels, check
        self.sequence = sequence = TokenSequence.of(prompt, hidden, mask, method.positions)
        self.n_visual, self.n_other, self.n_text = prompt.n_visual, prompt.n_other, prompt.n_text
        self.trace = Trace(start=sequence.ids)
        end = sequence.start + prompt.valid.sum(1, keepdim=True)  # (B, 1) position of the first new token
        self.decode = DecodeState([Stage(0, sequence.padding, sequence.length)], sequence.length, end[None])
        self.patch_table = patch_table(prompt.images, sequence.visual, prompt.source, max(self.n_visual))
        if prompt.images.tokens is not None:
            self._replace_patches(prompt.images.tokens, prompt)
        elif prompt.gaps and prunes_inside(type(method)):
            self._keep_visual(sequence.visual, self.n_visual)
        more = max(0, *(n - b for n, b in zip(self.n_visual, prompt.n_visual, strict=True)))  # PruMerge+ can add one
        self.rotary = Rotary(lm, hidden, prompt.top + more)
        before = None
        if prompt.pad is not None:
            before = torch.arange(hidden.shape[1], device=hidden.device) >= prompt.pad
        self.masks = Masks(lm.config, before)
        self.text = self._text()
        self.rope: tuple[Tensor, Tensor]
        self.mask: Any

    def fork(self, cache: Any) -> Prefill:
        """Return a copy that continues from this state with another cache and leaves this one unchanged.

        Tensors are shared.
        """
        fork = copy.copy(self)
        fork.sequence, fork.rotary, fork.masks = copy.copy(self.sequence), copy.copy(self.rotary), copy.copy(self.masks)
        fork.trace = copy.copy(self.trace)
        fork.trace.entries, fork.trace.cuts = list(self.trace.entries), list(self.trace.cuts)
        fork.trace.final, fork.trace.scratch = None, dict(self.trace.scratch)
        fork.decode, fork.cache = copy.copy(self.decode), cache
        return fork

    # before the first layer ----------------------------------------------------------------------------------
    def _text(self) -> Tensor:
        """Return (B, Q) bool, see Spans.text; the samples must be right-aligned."""
        visual = self.sequence.visual
        text = after_image(visual, self.sequence.valid)[:, -self.n_text :]
        alone = visual.any(1) & ~text.any(1)
        text[:, -1] |= alone
        return text

    def _keep_visual(self, live: Tensor, left: tuple[int, ...]) -> None:
        """Keep the visual tokens that are `live`, left[b] tokens of sample b, and right-align the samples."""
        s = self.sequence
        lengths = [c + n for c, n in zip(self.n_other, left, strict=True)]
        self._apply(-1, assemble(s.visual & live, s.visual, s.valid, lengths))
        self.n_visual = left

    def _replace_patches(self, tokens: VisionTokens, prompt: Prompt) -> None:
        """Replace the patches of the images by the tokens that `prune_vision` chose or made."""
        if prompt.source is None:
            raise ValueError("a method that prunes before the language model must know the patch of each visual token")
        s = self.sequence
        embeds = tokens.embeds.to(s.hidden.device, s.hidden.dtype).flatten(0, 1)  # (N K, D)
        if prompt.token is not None and prompt.live is not None:
            s.hidden = torch.where((prompt.token >= 0)[..., None], embeds[prompt.token.clamp(min=0)], s.hidden)
            self._keep_visual(prompt.live, prompt.left)
        else:
            placed = place_tokens(tokens, s.visual, prompt.source, prompt.first, prompt.ids)
            lengths = [c + n for c, n in zip(self.n_other, placed.counts, strict=True)]
            none, places = torch.zeros_like(s.visual), s.patch_positions(placed.ids)
            given = embeds[placed.index]  # (B, C, D)
            cut = assemble(none, s.visual, s.valid, lengths, given, placed.counts, placed.after)
            if tokens.groups is not None:
                width = tokens.ids.shape[1]
                members = functools.partial(vision_members, tokens.groups, prompt.source, s.visual, placed, width)
                cut = replace(cut, members=members)
            self._apply(-1, cut, placed.ids, places)
            self.n_visual = tuple(placed.counts)
        if self.method.vision_positions == "renumber":
            s.renumber()
            self.decode.starts = (s.valid.sum(1, keepdim=True) + s.start)[None]

    # layers --------------------------------------------------------------------------------------------------
    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """Run the whole prefill and return (B, L', D) states after the last layer."""
        self.begin()
        for i in range(len(self.lm.layers)):
            view = self.layer(i, kwargs)
            if view is not None:
                decide(self.method, i, view)
                self.prune(i, view)
            del view  # frees its tensors before the next layer runs
        return self.end()

    def begin(self) -> None:
        """Apply the cuts before the first layer."""
        self._cut_by_entry_method()
        cut = self.method.prune(-1, self._view(None))
        if cut is not None:
            self._apply(-1, cut)
        self._prepare(0)

    def _cut_by_entry_method(self) -> None:
        """Apply the entry cut of the first method of a composition; its tokens then count as the prompt."""
        first, spans = self.method.entry, self._spans()
        keep = None if first is None else first.keep_after(-1, spans)
        cut = None if first is None or keep is None else first.prune(-1, self._view(None))
        if keep is None or cut is None:
            return
        self._apply(-1, cut)
        self.n_visual, s = tuple(keep), self.sequence
        s.renumber()
        self.decode.starts = (s.valid.sum(1, keepdim=True) + s.start)[None]

    def _prepare(self, layer: int) -> None:
        """Compute rotary embedding and attention mask for `layer` and the layers after it."""
        self.rope, self.mask = self.rotary.of(self.sequence), self.masks.of(self.sequence, layer, self.cache)

    def layer(self, i: int, kwargs: dict[str, Any]) -> View | None:
        """Run one layer and return the view for its cut, or None after the last layer."""
        layer, layers, s = self.lm.layers[i], self.lm.layers, self.sequence
        self.trace.entries.append((s.ids, s.visual))
        before, rope = s.hidden, self.rope
        spans = self._spans()
        wanted = self.method.queries(i, spans)
        check_positions(self.method, i, wanted, spans.length, self.check)
        needs_input = self.method.needs_mlp_input(i, spans)
        with catch_mlp_input(layer, needs_input) as mlp_input, catch_queries(layer, wanted) as queries:
            s.hidden = layer(
                before,
                attention_mask=self.mask,
                position_embeddings=rope,
                position_ids=None,
                **{CACHE: self.cache},
                use_cache=self.cache is not None,
                **kwargs,
            )
        if needs_input and not mlp_input:
            raise ValueError(
                f"{self.method.name or self.method!r} reads the input of the MLP in decoder layer {i}, which a layer "
                "that is compiled on its own (torch.compile) does not show; compile the whole model after attaching, "
                "or use another method"
            )
        if s.hidden.device != before.device:  # a model spread over several devices
            self._follow(s.hidden.device, i + 1)
            before, rope = before.to(s.hidden.device), (rope[0].to(s.hidden.device), rope[1].to(s.hidden.device))
        attended = self.masks.attended(s)
        cached = self._keys(i)
        score = _Attention(layer, before, rope, attended, cached, queries, self.kernels)
        if i + 1 == len(layers):
            self._leave_last_cut(i, score, wanted)
            return None
        following = _Attention(layers[i + 1], s.hidden, rope, attended, kernels=self.kernels)
        attention = None if wanted is None else score(wanted)
        return self._view(attention, following, rope, before, mlp_input[0] if mlp_input else None, score.layer_keys)

    def _follow(self, device: torch.device, layer: int) -> None:
        """Move the state of the prefill to the device on which `layer` runs."""
        self.sequence.to(device)
        self.text = self.text.to(device)
        for name, value in self.trace.scratch.items():
            self.trace.scratch[name] = value.to(device) if isinstance(value, Tensor) else value
        self._prepare(layer)

    def _leave_last_cut(self, layer: int, score: _Attention, wanted: Positions | None) -> None:
        """Leave the cut after the last layer to the record, which computes it when it is read."""
        if not prunes_inside(type(self.method)):
            return
        final: Callable[[], tuple[Tensor, Tensor]]
        final = _LastCut(self.method, layer, score, wanted, self._view(None, keys=score.layer_keys), self.trace)
        if head_group(self.lm.layers[layer].self_attn) is not None:  # a gather needs all processes: compute it now
            final = functools.partial(_constant, final())
        self.trace.final = final

    def prune(self, i: int, view: View) -> None:
        """Apply the cut after a layer; the host values must be decided before."""
        cut = self.method.prune(i, view)
        if cut is not None:
            self._apply(i, cut)
            self._prepare(i + 1)

    def end(self) -> Tensor:
        """Return (B, L', D) states and set the positions of generated tokens."""
        if self.method.decode == "cache":
            self.decode.starts = torch.stack([self._cached(s) for s in self.decode.stages])
        return self.sequence.hidden

    def _cached(self, stage: Stage) -> Tensor:
        """Return (B, 1), the position that follows the tokens cached by the layers of a stage."""
        start = self.sequence.start
        if stage.valid is None:
            return start + stage.length
        return start + stage.valid.to(start.device).long().sum(1, keepdim=True)

    # helpers -------------------------------------------------------------------------------------------------
    def _spans(self) -> Spans:
        return Spans(self.sequence.length, self.n_text, self.text, self.n_visual, len(self.lm.layers))

    def _view(
        self,
        attention: Tensor | None,
        next_attention: Any = None,
        rope: tuple[Tensor, Tensor] | None = None,
        layer_input: Tensor | None = None,
        mlp_input: Tensor | None = None,
        keys: Callable[[], Tensor] | None = None,
    ) -> View:
        s = self.sequence
        return View(
            hidden=s.hidden,
            visual=s.visual,
            valid=s.valid,
            ids=s.ids,
            attention=attention,
            spans=self._spans(),
            scratch=self.trace.scratch,
            n_other=self.n_other,
            patch_table=self.patch_table,
            next_attention=next_attention,
            rope=rope,
            layer_input=layer_input,
            mlp_input=mlp_input,
            find_keys=keys,
            final_norm=functools.partial(_normed, self.lm.norm),
            kernels=self.kernels,
        )

    def _apply(self, layer: int, cut: Cut, ids: Tensor | None = None, places: Tensor | None = None) -> None:
        """Apply a cut to the sequence, log it, and begin a new stage at layer + 1."""
        s = self.sequence
        check_form(self.method, cut, s.visual.shape[0])
        if self.check:
            check_cut(cut, s.visual, s.valid)
        s.apply(cut, ids, places)
        self.trace.cuts.append(Step(layer, cut.index, ids, cut.members))
        stage = Stage(layer + 1, s.padding, s.length)
        self.decode.stages = [t for t in self.decode.stages if t.first != layer + 1] + [stage]

    def _keys(self, layer: int) -> Tensor | None:
        """Return the keys that the layer has just cached, or None if the cache does not hold them as a local tensor."""
        kept = getattr(self.cache, "layers", None)
        keys = getattr(kept[layer], "keys", None) if kept is not None and len(kept) > layer else None
        if not isinstance(keys, Tensor) or keys.device != self.sequence.hidden.device:  # such as an offloaded cache
            return None
        return keys if keys.shape[2] == self.sequence.length else None


def decide(method: Method, layer: int, view: View) -> None:
    """Read the host values that a method asks for and store the method's decision in the scratch dict."""
    values = method.host_values(layer, view)
    if values is not None:
        view.scratch["decision"] = method.decide(layer, values.tolist(), view)


class _Attention:
    """A callable that computes a layer's attention at given positions.

    It uses `keys` and `queries` of the layer where they are given, and projects them again otherwise.
    """

    def __init__(
        self,
        layer: Any,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        attended: Tensor | None,
        keys: Tensor | None = None,
        queries: list[Tensor] | None = None,
        kernels: Any = None,
    ) -> None:
        self.layer, self.hidden, self.rope, self.attended = layer, hidden, rope, attended
        self.keys, self.queries, self.kernels = keys, queries, kernels

    def layer_keys(self) -> Tensor:
        """Return (B, KV, L, dh) keys with rotary embedding."""
        home, (hidden, rope, _) = self.hidden.device, self._there()
        return decoder_keys(self.layer, hidden, rope, self.keys).to(home)

    def _there(self) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Return input, rotary embedding and mask on the device of the layer; the next layer may be on another one."""
        there = execution_device(self.layer, self.hidden.device)
        hidden, rope, attended = self.hidden, self.rope, self.attended
        if there != self.hidden.device:
            hidden, rope = hidden.to(there), (rope[0].to(there), rope[1].to(there))
            attended = None if attended is None else attended.to(there)
        return hidden, rope, attended

    def __call__(self, positions: Positions) -> Tensor:
        home, (hidden, rope, attended) = self.hidden.device, self._there()
        queries = self.queries[0] if self.queries else None
        return decoder_attention(self.layer, hidden, rope, positions, attended, self.keys, queries, self.kernels).to(
            home
        )


class _LastCut:
    """The cut after the last layer. It does not change the output, so it is computed only when the record is read."""

    def __init__(
        self, method: Method, layer: int, score: _Attention, wanted: Positions | None, view: View, trace: Trace
    ) -> None:
        self.method, self.layer, self.score, self.wanted, self.view = method, layer, score, wanted, view
        self.trace = trace

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        view = self.view
        view.attention = None if self.wanted is None else self.score(self.wanted)
        decide(self.method, self.layer, view)
        cut = self.method.prune(self.layer, view)
        if cut is None:
            return view.ids, view.visual
        self.trace.cuts.append(Step(self.layer, cut.index, None, cut.members))
        return gather_ids_by_cut(view.ids, cut)


def _normed(norm: Any, states: Tensor) -> Tensor:
    """Apply the model's final norm, which may be on another device, to (B, R, D) states."""
    out: Tensor = norm(states.to(execution_device(norm, states.device)))
    return out.to(states.device)


def _constant(value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return value
