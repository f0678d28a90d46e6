"""Prefills that are captured as CUDA graphs and replayed for later requests of the same shape.

At batch size 1, a prefill of a few hundred tokens consists of about a thousand small kernels, and a GPU finishes each
of them before Python launches the next. A replay launches all of them at once. A prefill is captured in pieces: one up
to each host value that the method asks for (`Method.host_values`; AutoPrune has one, most methods none), and one after
the last. The next piece depends on the result of `Method.decide`, so there is one for each decision; AutoPrune with
`slope_step` has few decisions. A piece is captured when it is needed for the second time; the first time it runs
normally.

Before a replay, inputs are copied into the captured input tensors. Afterwards, caches, states and record are copied
out, so the next replay does not change them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..methods.base import Method
from ..methods.checks import integer
from ..methods.views import PADDING, View
from ..runtime.compat import DynamicCache
from ..runtime.decode import DecodeState
from ..runtime.prefill import Prefill
from ..runtime.prompt import Prompt, padded
from ..runtime.record import Trace
from ..runtime.state import ImageState
from .steps import Recordings, Steps, recordable

LIMIT = 32
"""Largest number of captured pieces; when it is reached, the next request drops all of them. Each piece holds the
memory of a prefill's cache; they share the memory of the largest layer."""

RECORDED = 3
"""Number of requests of the same kind after which a method with one host value is completely captured, since each piece
is captured when it is needed for the second time."""


class Recorder(Protocol):
    """Runs a function and captures its operations."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Return (the result of `run`, a function that repeats its operations on the same memory)."""


class CudaRecorder:
    """Captures CUDA graphs that share a memory pool. The result of `run` holds valid values after the first replay."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()  # libraries initialise in a first run, which is not possible inside a capture
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # loaders may pin memory
                out = run()
        return out, graph.replay


def recorder(device: torch.device) -> Recorder:
    """Return the recorder for a device.

    Raises:
        ValueError: for a device without CUDA graphs.
    """
    if device.type != "cuda":
        raise ValueError(f"graphs=True needs a CUDA device, and the model is on {device}; leave graphs out")
    return CudaRecorder(device)


def check_step(text_step: int | None, recording: bool) -> None:
    """Refuse a `text_step` if nothing is captured.

    Raises:
        ValueError: if `text_step` is given and `recording` is False.
    """
    if text_step is not None and not recording:
        raise ValueError(f"text_step={text_step} needs graphs=True (--graphs)")


@dataclass
class _Stop:
    """The end of a piece: a layer after which the method asks for host values, or the end of the prefill.

    Attributes:
        prefill: the prefill.
        layer: the layer that ran last.
        view: the view after this layer; None at the end.
        asked: the values that the host has to read; None at the end.
        ids: original indices of the tokens at all layers, concatenated; at the end only.
        widths: number of tokens at each layer in `ids`.
    """

    prefill: Prefill
    layer: int
    view: View | None = None
    asked: Tensor | None = None
    ids: Tensor | None = None
    widths: list[int] = field(default_factory=list)


@dataclass
class _Piece:
    stop: _Stop
    replay: Callable[[], None]
    inputs: list[Tensor] = field(default_factory=list)
    next: Recordings[_Piece] = field(default_factory=Recordings)


_Pieces = Recordings[_Piece]


class Graphs:
    """The captured graphs of one method on one model. Not safe for several threads at once.

    Args:
        method: the pruning method. Prefills are captured if `Method.replays` is set, decoding steps for every method.
        device: device of the model.
        text_step: rounds the text length after the image up to a multiple, by masked positions before the prompt, so
            that questions of similar lengths share a capture (sdpa only; answers are equal up to rounding). None
            captures exact lengths.

    Raises:
        ValueError: for a device without CUDA graphs, or a step that is not a positive integer.
    """

    def __init__(self, method: Method, device: torch.device, text_step: int | None = None) -> None:
        integer("text_step", text_step, 1)
        self.method, self.recorder, self.text_step = method, recorder(device), text_step
        self.first = _Pieces()
        self.count = 0
        self.step = Steps(self.recorder.record).run

    def run(
        self, lm: Any, kernels: Any, prompt: Prompt, cache: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, DecodeState, Trace] | None:
        """Replay a prefill, fill the cache, and return states, decode state and trace; None if it has to run normally.

        A prefill is not replayed for several samples, with padding, with tokens that replace the patches, if it is not
        `recordable`, in a model of fewer than 3 layers (where AutoPrune would decide after the last layer), and if its
        first piece is needed for the first time.
        """
        if not self.method.replays or hidden.shape[0] > 1 or not prompt.full or prompt.images.tokens is not None:
            return None
        if len(lm.layers) < 3 or not recordable(lm, cache, kwargs):
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._run(lm, kernels, prompt, cache, hidden)

    def _run(
        self, lm: Any, kernels: Any, prompt: Prompt, cache: Any, hidden: Tensor
    ) -> tuple[Tensor, DecodeState, Trace] | None:
        if self.count >= LIMIT:
            self.first, self.count = _Pieces(), 0
        extra = 0
        if self.text_step is not None and lm.config._attn_implementation == "sdpa":  # others read the mask on the host
            extra = -prompt.n_text % self.text_step
            prompt, hidden = padded(prompt, extra), pad(hidden, (0, 0, extra, 0))
        patch_values = prompt.images.patch_values
        names = sorted(patch_values)
        given = [hidden, prompt.visual, prompt.valid, prompt.positions, *(patch_values[n] for n in names)]
        given += [x for x in (prompt.source, prompt.pad) if x is not None]
        key = (
            tuple((tuple(t.shape), t.dtype) for t in given), tuple(names), kernels is None,
            prompt.n_visual, prompt.n_other, prompt.n_text, prompt.gaps, prompt.top,
        )  # fmt: skip
        if not self.first.again(key):
            return None
        if key not in self.first.known:
            inputs = [t.to(hidden.device).clone() for t in given]
            it = iter(inputs)
            states, visual, valid, positions = (next(it) for _ in range(4))
            images = ImageState(patch_values={n: next(it) for n in names})
            source = None if prompt.source is None else next(it)
            fixed: dict[str, Any] = {"visual": visual, "valid": valid, "positions": positions, "source": source}
            same = replace(prompt, **fixed, images=images, pad=next(it, None))
            empty = _empty_cache(lm, hidden)

            def begin() -> _Stop:
                prefill = Prefill(lm, self.method, same, _forked_cache(empty), None, states, kernels)
                prefill.begin()
                return self._advance(prefill, -1)

            self._record(self.first, key, begin, inputs)
        piece = self.first.known[key]
        for old, new in zip(piece.inputs, given, strict=True):
            old.copy_(new)
        piece.replay()
        stop, pieces = piece.stop, piece.next
        stats: dict[str, Any] = {}
        while stop.asked is not None:
            assert stop.view is not None
            view = replace(stop.view, scratch=dict(stop.view.scratch))
            decision = self.method.decide(stop.layer, stop.asked.tolist(), view)
            stats = view.scratch.get("stats", stats)

            def go_on(stop: _Stop = stop, decision: Hashable = decision) -> _Stop:
                prefill, view = _forked(stop)
                view.scratch["decision"] = decision
                prefill.prune(stop.layer, view)
                return self._advance(prefill, stop.layer)

            if not pieces.again(decision):
                stop, pieces = go_on(), _Pieces()  # all later pieces are new as well
                continue
            piece = pieces.known.get(decision) or self._record(pieces, decision, go_on)
            piece.replay()
            stop, pieces = piece.stop, piece.next
        return _delivered(stop, cache, stats, extra)

    def _record(
        self, pieces: _Pieces, key: Hashable, run: Callable[[], _Stop], inputs: list[Tensor] | None = None
    ) -> _Piece:
        self.count += 1
        pieces.known[key] = piece = _Piece(*self.recorder.record(run), inputs or [])
        return piece

    def _advance(self, prefill: Prefill, layer: int) -> _Stop:
        """Continue a prefill after a layer, up to the next host value or to the end."""
        for i in range(layer + 1, len(prefill.lm.layers)):
            view = prefill.layer(i, {})
            if view is None:
                break
            asked = self.method.host_values(i, view)
            if asked is not None:
                return _Stop(prefill, i, view, asked)
            prefill.prune(i, view)
        prefill.end()
        ids = [ids for ids, _ in [*prefill.trace.entries, prefill.trace.last()]]
        return _Stop(prefill, len(prefill.lm.layers), ids=torch.cat(ids, 1), widths=[x.shape[1] for x in ids])


def _delivered(stop: _Stop, cache: Any, stats: dict[str, Any], extra: int) -> tuple[Tensor, DecodeState, Trace]:
    """Copy the results of a replay, without the `extra` positions before the prompt, and fill the cache."""
    assert stop.ids is not None
    prefill = stop.prefill
    for i, layer in enumerate(prefill.cache.layers):
        cache.update(layer.keys[:, :, extra:], layer.values[:, :, extra:], i)  # this copies
    request = copy.copy(prefill.decode)
    request.starts, request.length = request.starts.clone(), request.length - extra
    request.stages = [replace(s, length=s.length - extra) for s in request.stages]
    ids = stop.ids.clone()
    *entries, last = ((x[:, extra:], x[:, extra:] > PADDING) for x in ids.split(stop.widths, 1))
    trace = Trace(entries, lambda: last, {"stats": stats} if stats else {})
    return prefill.sequence.hidden[:, extra:].clone(), request, trace


def _empty_cache(lm: Any, hidden: Tensor) -> Any:
    """Return an empty cache with initialised layers, since layers cannot be initialised inside a capture."""
    cache = DynamicCache(config=lm.config)
    nothing = hidden.new_empty(hidden.shape[0], 1, 0, 1)
    for layer in cache.layers:
        layer.lazy_initialization(nothing, nothing)  # type: ignore[union-attr]
    return cache


def _forked_cache(cache: Any) -> Any:
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _forked(stop: _Stop) -> tuple[Prefill, View]:
    """Return a prefill that continues from that of `stop` and leaves it unchanged, and its view; tensors are shared."""
    assert stop.view is not None
    prefill = stop.prefill.fork(_forked_cache(stop.prefill.cache))
    return prefill, replace(stop.view, scratch=prefill.trace.scratch)
