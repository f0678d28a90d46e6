"""Decoding steps, each captured as one CUDA graph.

A decoding step also consists of about a thousand small kernels, and the KV caches change their shape at every step.
Here the caches of a request are in buffers of fixed sizes, one size for each stage of pruning. A step writes one column
and attends under a bias that masks the unused columns. The request's own cache holds views of the used part of the
buffers, so it can be read, copied and cropped as usual, and decoding continues normally if a step cannot be replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..ops.selection import to_device
from ..runtime.compat import DynamicCache
from ..runtime.decode import Decode, Stage, run_layers, stage_of

GRAIN = 64
"""Buffer sizes are multiples of this number, so that requests with similar token counts share a capture."""
ROOM = (64, 256, 1024, 4096, 16384)
"""Possible numbers of columns for new tokens. The smallest sufficient one is used, and each needs its own capture."""
LIMIT = 32
"""Largest number of captured steps; when it is reached, the next step drops all of them. They share their buffers."""
BACKENDS = ("sdpa", "eager")
"""Attention backends that take a bias; flash-attn reads the lengths of a mask on the host."""


@dataclass
class _Step:
    """The tensors that a captured step reads.

    Attributes:
        hidden: (B, 1, D) embedding of the new token.
        positions: (S or 1, B, 1) long, its position ids.
        live: (B,) bool, False if the new token of a sample is padding.
        seen: (1,) long, number of tokens since the prompt.
        lengths: (S,) long, number of prompt columns in each stage.
        bias: (S, B, 1, C), 0 on columns that may be attended to, -inf elsewhere.
        keys, values: (B, KV, C', dh) buffers of each layer.
    """

    hidden: Tensor
    positions: Tensor
    live: Tensor
    seen: Tensor
    lengths: Tensor
    bias: Tensor
    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class _Recorded:
    """A captured step with its (B, 1, D) output states."""

    step: _Step
    out: Tensor
    replay: Callable[[], None]


class _Columns:
    """The cache object for decoder layers in a captured step: `update` writes one column and returns whole buffers."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], at: list[Tensor]) -> None:
        self.keys, self.values, self.at = keys, values, at

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer_idx].index_copy_(2, self.at[layer_idx], keys)
        self.values[layer_idx].index_copy_(2, self.at[layer_idx], values)
        return self.keys[layer_idx], self.values[layer_idx]


T = TypeVar("T")


@dataclass
class Recordings(Generic[T]):
    """Captures by key. A key is captured when it is requested for the second time.

    Attributes:
        known: key -> capture.
        seen: keys that were requested before.
    """

    known: dict[Hashable, T] = field(default_factory=dict)
    seen: set[Hashable] = field(default_factory=set)

    def again(self, key: Hashable) -> bool:
        """Return whether `key` was requested before, and remember it."""
        before = key in self.seen
        self.seen.add(key)
        return before


def recordable(lm: Any, cache: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a request can be captured and replayed.

    It needs disabled gradients, a DynamicCache of transformers without offloading, layers that accelerate has not
    wrapped, and no further arguments of the layers.
    """
    if torch.is_grad_enabled() or kwargs or type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return not any("_hf_hook" in vars(layer) for layer in lm.layers)


class Steps:
    """The captured decoding steps of one model, and their shared buffers, which hold one request at a time.

    Args:
        record: see `graphs.Recorder.record`.
    """

    def __init__(self, record: Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]) -> None:
        self.record = record
        self.forget()

    def forget(self) -> None:
        """Drop captures and buffers; a request whose cache is in the buffers keeps them alive."""
        self.recordings: Recordings[_Recorded] = Recordings()
        self.memory: list[tuple[Tensor, Tensor]] = []  # flat buffers for keys and values of each layer
        self.shown: list[tuple[Tensor, Tensor]] = []  # the views of them in the owner's cache
        self.owner: Callable[[], Any] = lambda: None
        self.held: _Step | None = None

    def run(self, decode: Decode, cache: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Replay a step and return (B, 1, D) states, valid until the next step; None if the step has to run normally.

        A step is not replayed for several tokens at once, after a later turn, with flash-attn, if it is not
        `recordable`, if there are too many tokens since the prompt, and for sizes that are needed for the first time.
        """
        lm, request = decode.lm, decode.request
        if decode.q != 1 or not request.whole or not recordable(lm, cache, kwargs):
            return None
        if lm.config._attn_implementation not in BACKENDS:
            return None
        seen = decode.tail.shape[1] - 1
        room = next((r for r in ROOM if r > seen), None)
        if room is None:
            return None
        sizes = [-(-(s.length + room) // GRAIN) * GRAIN for s in request.stages]
        layers, like = tuple((s.first, n) for s, n in zip(request.stages, sizes, strict=True)), cache.layers[0].keys
        key = layers, decode.positions.shape, hidden.shape, hidden.dtype, like.shape[1], like.shape[3], like.dtype
        if len(self.recordings.known) >= LIMIT:
            self.forget()
        if not self.recordings.again(key):
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._run(key, sizes, decode, cache, hidden, seen)

    def _run(self, key: Hashable, sizes: list[int], decode: Decode, cache: Any, hidden: Tensor, seen: int) -> Tensor:
        recorded = self.recordings.known.get(key)
        mine = recorded is not None and recorded.step is self.held and self._shows(cache)
        if not mine:
            self._release()
        step = self._prepare(sizes, decode, cache, hidden) if recorded is None else recorded.step
        if not mine:
            self._hold(step, decode, cache, seen)
        step.hidden.copy_(hidden)
        step.positions.copy_(decode.positions)
        step.live.copy_(decode.tail[:, -1])
        step.seen.fill_(seen)
        stages = decode.request.stages
        if recorded is None:
            recorded = _Recorded(step, *self.record(lambda: _advance(step, decode.lm, stages)))
            self.recordings.known[key] = recorded
        recorded.replay()
        self._show(step, cache, [stages[n].length + seen + 1 for n in stage_of(stages, len(step.keys))])
        return recorded.out

    def _prepare(self, sizes: list[int], decode: Decode, cache: Any, hidden: Tensor) -> _Step:
        """Return buffers for a capture, as views of the shared memory, which grows if it is too small."""
        batch, _, width = hidden.shape
        of = stage_of(decode.request.stages, len(cache.layers))
        shapes = [(*x.keys.shape[:2], sizes[n], x.keys.shape[3]) for x, n in zip(cache.layers, of, strict=True)]
        need = [torch.Size(s).numel() for s in shapes]
        if not self.memory or any(k.numel() < n for (k, _), n in zip(self.memory, need, strict=True)):
            have = [k.numel() for k, _ in self.memory] or [0] * len(need)
            self.recordings.known = {}  # existing captures refer to the old memory
            like, sized = cache.layers[0].keys, [max(a, b) for a, b in zip(have, need, strict=True)]
            self.memory = [(like.new_zeros(n), like.new_zeros(n)) for n in sized]
        keys = [k[:n].view(s) for (k, _), n, s in zip(self.memory, need, shapes, strict=True)]
        values = [v[:n].view(s) for (_, v), n, s in zip(self.memory, need, shapes, strict=True)]
        count = len(sizes)
        return _Step(
            hidden=hidden.new_zeros(batch, 1, width),
            positions=torch.zeros_like(decode.positions),
            live=torch.ones(batch, dtype=torch.bool, device=hidden.device),
            seen=torch.zeros(1, dtype=torch.long, device=hidden.device),
            lengths=torch.zeros(count, dtype=torch.long, device=hidden.device),
            bias=hidden.new_zeros(count, batch, 1, max(sizes)),
            keys=keys,
            values=values,
        )

    def _hold(self, step: _Step, decode: Decode, cache: Any, seen: int) -> None:
        """Copy a request's cache into the buffers; set other columns to 0, since even masked columns must be finite."""
        stages = decode.request.stages
        for keys, values, layer in zip(step.keys, step.values, cache.layers, strict=True):
            for buffer, states in ((keys, layer.keys), (values, layer.values)):
                buffer[:, :, : states.shape[2]] = states
                buffer[:, :, states.shape[2] :] = 0
        step.lengths.copy_(to_device([s.length for s in stages], step.lengths))
        step.bias.fill_(-torch.inf)
        before = decode.tail[:, None, :seen]  # (B, 1, seen)
        for bias, stage in zip(step.bias, stages, strict=True):
            prompt = bias[..., : stage.length].zero_()
            if stage.valid is not None:
                prompt.masked_fill_(~stage.valid.bool()[:, None], -torch.inf)
            bias[..., stage.length : stage.length + seen].masked_fill_(before, 0)
        self.owner, self.held = weakref.ref(cache), step

    def _show(self, step: _Step, cache: Any, lengths: list[int]) -> None:
        """Make the cache refer to the used part of the buffers."""
        self.shown = []
        for layer, keys, values, n in zip(cache.layers, step.keys, step.values, lengths, strict=True):
            layer.keys, layer.values = keys[:, :, :n], values[:, :, :n]
            self.shown.append((layer.keys, layer.values))

    def _shows(self, cache: Any) -> bool:
        """Return whether a cache is the owner's and unchanged since the last step."""
        if self.owner() is not cache or len(cache.layers) != len(self.shown):
            return False
        pairs = zip(cache.layers, self.shown, strict=True)
        return all(layer.keys is keys and layer.values is values for layer, (keys, values) in pairs)

    def _release(self) -> None:
        """Copy the owner's columns out of the buffers into its cache, even if the cache was cropped."""
        cache = self.owner()
        for layer, ours in zip(cache.layers if cache is not None else (), self.memory, strict=False):
            for name, memory in zip(("keys", "values"), ours, strict=True):
                states = getattr(layer, name)
                if states.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr():
                    setattr(layer, name, states.clone())
        self.owner, self.shown, self.held = (lambda: None), [], None


def _advance(step: _Step, lm: Any, stages: list[Stage]) -> Tensor:
    """Run one token through the layers. Running it twice gives the same result."""
    at = step.lengths + step.seen  # (S,)
    new = torch.zeros_like(step.live, dtype=step.bias.dtype).masked_fill_(~step.live, -torch.inf)
    places = at[:, None, None, None].expand(*step.bias.shape[:3], 1)
    step.bias.scatter_(3, places, new[None, :, None, None].expand_as(places))
    columns = _Columns(step.keys, step.values, [at[n : n + 1] for n in stage_of(stages, len(lm.layers))])
    masks = [step.bias[n, :, None, :, : step.keys[s.first].shape[2]] for n, s in enumerate(stages)]
    return run_layers(lm, stages, step.positions, masks, step.hidden, columns, {})
