"""Put a method on a model and take it off again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core import fused as kernels
from ..core.method import Method
from ..core.registry import build
from ..families.base import family_of, restore, tower_of
from .door import Door
from .graphs import Graphs, check_step
from .loop import State, pruned_forward
from .request import PENDING, VISION, Record


class Handle:
    """A method at work on a model.

    Attributes:
        method: the method.
        last: the last prefill's `Record` (tokens_in, tokens_out, kept, stats), None before the first.
    """

    def __init__(self, model: Any, method: Method, state: State, undo: list[Callable[[], None]]) -> None:
        self.method = method
        self._model, self._state, self._undo = model, state, undo

    @property
    def last(self) -> Record | None:
        return self._state.last

    def detach(self) -> None:
        """Restore the model as `attach` found it. A second call does nothing.

        Raises:
            RuntimeError: when somebody else replaced the forward in the meantime; undo that first.
        """
        if not self._undo:
            return
        lm = family_of(self._model).language_model(self._model)
        if _state_of(lm) is not self._state:
            raise RuntimeError("the model's forward is not the one that attach put there; undo the later change first")
        while self._undo:
            self._undo.pop()()
        PENDING.set(None)
        VISION.set(None)


def _state_of(lm: Any) -> State | None:
    forward = lm.__dict__.get("forward")
    if isinstance(forward, functools.partial) and forward.func is pruned_forward:
        return forward.args[1]
    return None


def attach(
    model: Any,
    method: str | Method,
    *,
    check: bool = False,
    graphs: bool | Graphs = False,
    text_step: int | None = None,
    fused: bool = False,
    **hyper: Any,
) -> Handle:
    """Prune `model` with `method` until the handle is detached.

    Attach after the model is on its device (and after accelerate's hooks).

    Args:
        model: haotian-liu/LLaVA's LlavaLlamaForCausalLM, or transformers' LlavaForConditionalGeneration or
            LlavaNextForConditionalGeneration.
        method: a name (`llava_prune.names()`) or a Method instance.
        check: verify every cut on the host (for tests of new methods; slow).
        graphs: record decoding, and prefills of single prompts where the method allows it (`Method.replays`), as CUDA
            graphs, and replay them for later ones of the same shapes. Give AutoPrune a `slope_step` with it. Other
            requests run as ever. Tensors taken out of a cache change with the next request, the cache itself does
            not. `Graphs` made for the same model and method outlive an attachment.
        text_step: with graphs=True, see `Graphs`: 16, say, lets questions of different lengths share recordings.
        fused: cuts by a few Triton kernels in place of dozens of small ones, where all samples keep the same counts;
            tokens kept are the same, sums up to rounding.
        hyper: hyper-parameters when `method` is a name.

    Returns:
        Handle.

    Raises:
        ValueError: unknown method or value, a foreign model, a model that is pruned already, graphs or
            fused where there is no CUDA device (or no triton), or a text_step without graphs. Nothing is changed then.
    """
    if isinstance(method, str):
        method = build(method, **hyper)
    elif hyper:
        raise ValueError(f"hyper-parameters {sorted(hyper)} go with a method's name; {method!r} is built already")
    elif not isinstance(method, Method):
        raise ValueError(f"{method!r} is neither a method's name nor a Method")
    family = family_of(model)
    lm = family.language_model(model)
    active = _state_of(lm)
    if active is not None:
        raise ValueError(f"the model is pruned by {active.method!r} already; detach that first")
    budget, limit = getattr(method, "tokens", None), family.max_visual(model)
    if isinstance(budget, int) and budget > limit:
        raise ValueError(f"tokens={budget}: a picture has at most {limit} visual tokens here; give {limit} or fewer")

    door = Door(method, tower_of(family, model), family.pads(model))
    previous = lm.__dict__.get("forward")
    state = State(method, previous)
    state.check = check
    state.kernels = kernels.load(model.device) if fused else None
    check_step(text_step, graphs is True)
    if graphs:
        state.graphs = graphs if isinstance(graphs, Graphs) else Graphs(method, model.device, text_step)
        if state.graphs.method is not method:
            raise ValueError(f"these recordings are of {state.graphs.method!r}, not of {method!r}; give graphs=True")
    undo: list[Callable[[], None]] = []

    try:
        lm.forward = functools.partial(pruned_forward, lm, state)
        undo.append(functools.partial(restore, lm, "forward", previous))
        undo.extend(door.install(family.tower(model), family.blocks(model), family.projector(model)))
        undo.extend(family.mark(model))
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return Handle(model, method, state, undo)


@contextmanager
def pruned(model: Any, method: str | Method, **options: Any) -> Iterator[Handle]:
    """`attach`, with all of its options, for the length of a with block.

    Example:
        with pruned(model, "autoprune", tokens=64) as handle:
            model.generate(...)
            handle.last.tokens_out
    """
    handle = attach(model, method, **options)
    try:
        yield handle
    finally:
        handle.detach()
