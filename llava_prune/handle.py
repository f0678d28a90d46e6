"""Attach a pruning method to a model and detach it again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .methods.base import Method, check_complete
from .methods.registry import build
from .models.base import Family, encoder_blocks, peel, refuse_wrappers
from .models.family import family_of
from .models.parallel import check_split
from .models.text_tower import text_tower
from .runtime.decoder import refuse_window
from .runtime.geometry import Geometry
from .runtime.language import language_forward
from .runtime.patching import Patch, replace_method
from .runtime.record import Record
from .runtime.vision import VisionHooks

ATTRIBUTE = "_llava_prune"
"""Attribute in which an attached model keeps its handle, so that a copy of the model can be detached too."""


class Handle:
    """A method attached to a model.

    Attributes:
        model: the model.
        method: the method.
        last: the `Record` of the last prefill with images (tokens_in, tokens_out, kept, stats, draw, show), or None
            before the first such prefill, during one, and after one that failed.
        check: whether every cut is verified on the host.
        vision: the hooks on the vision tower and the projector.
        geometry: maps visual tokens to boxes in the image.
        engine: the acceleration engine (experimental), or None for plain torch.
    """

    vision: VisionHooks
    geometry: Geometry

    def __init__(self, model: Any, method: Method, check: bool = False, engine: Any = None) -> None:
        self.method = method
        self.last: Record | None = None
        self.check, self.engine = check, engine
        self.model: Any = model
        self._undo: list[Any] = []

    @property
    def attached(self) -> bool:
        """Whether the model is pruned by this handle."""
        return bool(self._undo)

    def install(self, family: Family) -> None:
        """Install all hooks and replacements; on an error, remove those that are installed and raise."""
        model, lm = self.model, family.language_model(self.model)
        encoder = family.encoder(model)
        try:
            self._undo.append(replace_method(lm, "forward", language_forward, self, lm))
            self._undo.extend(
                self.vision.install(family.tower(model), encoder, encoder_blocks(encoder), family.projector(model))
            )
            self._undo.extend(family.install(model, self))
            setattr(model, ATTRIBUTE, self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the model to its state before `attach`. A second call does nothing.

        Raises:
            RuntimeError: if other code has replaced a method of the model after `attach`; undo that replacement first.
        """
        for step in self._undo:
            if isinstance(step, Patch):
                step.check()
        while self._undo:
            self._undo.pop().remove()
        self.model.__dict__.pop(ATTRIBUTE, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """Return a handle of the copied model, or this one if only a part of the model is copied (PEFT does that)."""
        if id(self.model) not in memo:
            return self
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "detached from"
        return f"Handle({self.method!r}, {state} {type(self.model).__name__}, last={self.last!r})"


def attach(
    model: Any,
    method: str | Method,
    *,
    check: bool = False,
    graphs: Any = False,
    text_step: int | None = None,
    fused: bool = False,
    **hyper: Any,
) -> Handle:
    """Prune `model` with `method` until the handle is detached.

    The model may be attached before or after `accelerate` dispatches it, and may be inside a PeftModel. Call
    torch.compile only after attaching.

    On an attached model, the logits of a forward with images are those of the remaining tokens: the last n logits
    belong to the last n input ids, n being the number of tokens after the image. `labels` are refused.

    Args:
        model: haotian-liu/LLaVA's LlavaLlamaForCausalLM or LlavaMistralForCausalLM, or transformers'
            LlavaForConditionalGeneration, LlavaNextForConditionalGeneration or LlavaOnevisionForConditionalGeneration
            with a Llama, Mistral, Qwen2 or Qwen3 language model; or a transformers pipeline that holds one of the
            transformers models.
        method: a name (`llava_prune.names()`) or a Method instance.
        check: verify every cut on the host (slow; for tests of new methods).
        graphs: experimental, see llava_prune.experimental: replay captured CUDA graphs.
        text_step: experimental, requires `graphs`: round text lengths up to a multiple of this number.
        fused: experimental: compute cuts with Triton kernels.
        hyper: hyper-parameters of the method, if `method` is a name.

    Returns:
        The handle of the attachment.

    Raises:
        ValueError: for an unknown method or value, a model that is not supported or lacks something that the method
            needs, a model that is already pruned, or acceleration that the device does not support. The model is
            unchanged in that case.
    """
    method = _built(method, hyper)
    check_complete(method)
    refuse_wrappers(model)
    model = peel(model)
    family = family_of(model)
    for part in (family.language_model(model), family.tower(model)):
        refuse_wrappers(part)
    refuse_window(family.language_model(model))
    check_split(family, model, bool(graphs or fused))
    active = attached_handle(model)
    if active is not None:
        raise ValueError(
            f"the model is pruned by {active.method!r} already (a copy of an attached model stays attached); call "
            "llava_prune.detach(model) first"
        )
    budget, limit = getattr(method, "tokens", None), family.max_visual(model)
    if isinstance(budget, int) and budget > limit:
        raise ValueError(f"tokens={budget}: an image has at most {limit} visual tokens here; give {limit} or fewer")
    handle = Handle(model, method, check)
    handle.vision = VisionHooks(handle, method, family.tower_facts(model))
    handle.geometry = family.geometry(model)
    folder = getattr(method, "clip", None)
    if folder is not None:
        text_tower(folder, model.device)  # raises for a folder without one
        handle.vision.text_tower = functools.partial(text_tower, folder)
    if graphs or fused or text_step is not None:
        from .experimental.engine import Engine

        handle.engine = Engine(method, model.device, graphs, text_step, fused)
    handle.install(family)
    return handle


def _built(method: str | Method, hyper: dict[str, Any]) -> Method:
    """Return the method instance for the arguments of `attach`."""
    if isinstance(method, str):
        return build(method, **hyper)
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is neither a method's name nor a Method")
    if hyper:
        raise ValueError(f"hyper-parameters {sorted(hyper)} go with a method's name; {method!r} is built already")
    return method


def attached_handle(model: Any) -> Handle | None:
    """Return the handle of an attached model, or None for a model without an attached method."""
    found: Handle | None = getattr(peel(model), "__dict__", {}).get(ATTRIBUTE)
    return found


def detach(model: Any) -> None:
    """Restore an attached model through the model itself; this also works for a copy of an attached model.

    Raises:
        ValueError: if no method is attached.
    """
    handle = attached_handle(model)
    if handle is None:
        raise ValueError(f"no method is attached to this {type(model).__name__}")
    handle.detach()


@contextmanager
def pruned(model: Any, method: str | Method, **options: Any) -> Iterator[Handle]:
    """Attach a method for the duration of a with block; takes all options of `attach`.

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
