"""Decoding steps of a pruned request.

Attention masks and positions are computed per stage, from the length of each layer's cache or from the unpruned length
(`Method.decode`). The masks and positions that generate() passes refer to the unpruned sequence and are not used as
they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .compat import CACHE, CAUSAL, create_causal_mask


@dataclass
class Stage:
    """A group of consecutive layers that see the same tokens.

    Attributes:
        first: the first layer of the group; it ends before the first layer of the next stage.
        valid: (B, L) attention mask; None if no position is padding.
        length: L, number of token positions.
    """

    first: int
    valid: Tensor | None
    length: int


@dataclass
class DecodeState:
    """The state that decoding needs. The prefill creates it and attaches it to the KV cache.

    Attributes:
        stages: ascending by first layer; the first stage begins at layer 0.
        length: length of the unpruned prompt, as generate() counts it.
        starts: (S, B, 1) position of the next token in each stage, or (1, B, 1) if all stages share it.
        whole: False once a later turn has added tokens that may be padding.
        open: whether a pruned model is decoding, so that the KV cache may grow.
    """

    stages: list[Stage]
    length: int
    starts: Tensor
    whole: bool = True
    open: bool = False

    def keep_in(self, cache: Any) -> None:
        """Attach the state to a KV cache, which then refuses new tokens from a model that is not pruned."""
        cache._llava_prune = self
        cache.update = functools.partial(_guarded_update, self, cache, cache.update)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Allow the KV cache to grow for the duration of the block."""
        self.open = True
        try:
            yield
        finally:
            self.open = False


def _guarded_update(state: DecodeState, cache: Any, stock: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `Cache.update` for a cache of a pruned request; raise outside `DecodeState.decoding`.

    A cache that was reset holds no tokens and is released: it may serve another request.
    """
    if not state.open and not cache.get_seq_length():
        cache._llava_prune, cache.update = None, stock
    elif not state.open:
        raise ValueError(
            "this KV cache belongs to a pruned request, its layers differ in length, and the model is not pruned any "
            "more; attach the method again to go on, or start a new cache"
        )
    return stock(*args, **kwargs)


def decode_state(cache: Any) -> DecodeState | None:
    """Return the decode state of a cache that holds tokens; None for an empty cache or one of an unpruned request."""
    found: DecodeState | None = getattr(cache, "_llava_prune", None)
    return found if found is not None and cache.get_seq_length() else None


def refuse_rebuilt(cache: Any) -> None:
    """Refuse a cache with the layers of a pruned prompt and without its decode state.

    Raises:
        ValueError: if the layers of the cache hold different numbers of tokens.
    """
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    lengths = {k.shape[2] for k in keys if isinstance(k, Tensor) and k.ndim == 4}
    if len(lengths) > 1:
        raise ValueError(
            f"the layers of this KV cache hold {min(lengths)} to {max(lengths)} tokens, and the positions of a pruned "
            "prompt are not known: a cache that is made again from the layers of another loses them; give the cache "
            "that generate() or forward() returned, or a deepcopy of it"
        )


def refuse_later_image(past: int) -> NoReturn:
    """Raise the error for an image that comes after the prefill."""
    raise ValueError(
        f"an image after {past} cached tokens, of an earlier turn or of prefix tuning: images are pruned in the "
        "prefill only; start a new cache with the whole conversation, or detach the method where a prefix is tuned"
    )


def _seen(request: DecodeState, cache: Any, batch: int) -> int:
    """Return the number of tokens that every layer has cached since the prefill.

    Raises:
        ValueError: if the cache was cropped into the prompt or unevenly, or if its samples were selected or repeated.
    """
    seen: int = cache.get_seq_length() - request.stages[0].length
    if seen < 0 or any(cache.get_seq_length(s.first) != s.length + seen for s in request.stages):
        raise ValueError(
            "the cache was cropped into the prompt, or its layers by different numbers of tokens (assisted generation "
            "and prompt lookup do that); a pruned prompt cannot be shortened, start a new cache"
        )
    made = request.starts.shape[1]
    if made != batch:
        raise ValueError(f"the cache was made for {made} samples and there are {batch} now; start a new cache")
    return seen


def stage_of(stages: Sequence[Stage], layers: int) -> list[int]:
    """Return the index of the stage of each layer."""
    first, n, out = {s.first: n for n, s in enumerate(stages)}, 0, []
    for i in range(layers):
        n = first.get(i, n)
        out.append(n)
    return out


def run_layers(
    lm: Any,
    stages: Sequence[Stage],
    positions: Tensor,
    masks: Sequence[Any],
    hidden: Tensor,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """Run new tokens through all decoder layers and return their (B, q, D) states after the last layer.

    Args:
        lm: the language model.
        stages: the stages of the request.
        positions: (S or 1, B, q) long, position ids for each stage or for all stages.
        masks: one attention mask for each stage.
        hidden: (B, q, D) embeddings of the new tokens.
        cache: the KV cache.
        kwargs: further arguments of a decoder layer.
    """
    cos, sin = lm.rotary_emb(hidden, positions.flatten(0, 1))
    shape = (*positions.shape, cos.shape[-1])
    turns = list(zip(cos.view(shape), sin.view(shape), strict=True))
    for layer, n in zip(lm.layers, stage_of(stages, len(lm.layers)), strict=True):
        hidden = layer(
            hidden,
            attention_mask=masks[n],
            position_embeddings=turns[min(n, len(turns) - 1)],
            position_ids=None,
            **{CACHE: cache},
            use_cache=True,
            **kwargs,
        )
    return hidden


class Decode:
    """One decoding step of a request, or a later turn of several tokens. Nothing is cut.

    Each stage has its own cache length, attention mask and positions.

    Args:
        lm: the language model.
        request: the decode state of the request.
        cache: the KV cache.
        mask: (B, L) attention mask over the unpruned sequence and all tokens after it, or None.
        hidden: (B, q, D) embeddings of the new tokens.
    """

    def __init__(self, lm: Any, request: DecodeState, cache: Any, mask: Any, hidden: Tensor) -> None:
        self.lm, self.request, self.cache = lm, request, cache
        batch, q = hidden.shape[:2]
        seen = _seen(request, cache, batch)
        new = seen + q
        tail = None if mask is None else mask[:, request.length : request.length + new]
        if tail is not None and tail.shape[1] != new:
            raise ValueError(
                f"{q} new tokens on a cache of {seen} after the prompt, but the attention mask covers "
                f"{tail.shape[1]}: a later turn needs the whole history in its mask, and a method that prunes before "
                "the first layer cannot continue from input_ids; start a new cache instead"
            )
        if tail is None and q > 1 and request.stages[0].length != request.length:
            raise ValueError(
                f"{q} new tokens after a prompt that was shortened before the first layer: forward() needs the "
                "attention mask of the whole history, so that it shows where they begin; generate() cannot continue "
                "such a cache, start a new one with the whole conversation"
            )
        ones = torch.ones(batch, new, dtype=torch.bool, device=hidden.device)
        self.tail = ones if tail is None else tail.bool().to(hidden.device)
        self.q = q
        steps = self.tail.cumsum(1)[:, -q:] - 1  # (B, q)
        if q > 1 and tail is not None:
            request.whole = False
        self.plain = q == 1 and request.whole
        self.positions = (request.starts.to(steps.device) + steps).clamp(min=0)  # (S or 1, B, q)

    def _mask(self, hidden: Tensor, stage: Stage) -> Any:
        if stage.valid is None and self.plain:
            return None  # a single query attends to every key
        before = stage.valid
        if before is None:
            before = torch.ones(hidden.shape[0], stage.length, dtype=torch.bool, device=hidden.device)
        live = torch.cat([before.to(hidden.device).bool(), self.tail], 1)
        backend = self.lm.config._attn_implementation
        if self.q == 1 and backend in CAUSAL:  # transformers' mask, without its inspection of the values
            return live[:, None, None] if backend == "sdpa" else live
        return create_causal_mask(
            config=self.lm.config,
            inputs_embeds=hidden,
            attention_mask=live,
            **{CACHE: self.cache},
            position_ids=None,
            layer_idx=stage.first,
        )

    def run(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        stages = self.request.stages
        masks = [self._mask(hidden, s) for s in stages]
        return run_layers(self.lm, stages, self.positions, masks, hidden, self.cache, kwargs)
