"""Put a method on a model and take it off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .methods.base import Method
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
"""Where an attached model keeps its handle, so that copies of it can be detached."""


class Handle:
    """A method attached to a model.

    Attributes:
        model: the model.
        method: the method.
        last: the `Record` of the last prefill with images (tokens_in, tokens_out, kept, stats, draw, show), None
            before the first.
        check: verify every cut on the host.
        vision: hooks on vision tower and projector.
        geometry: where in an image its visual tokens are.
        engine: acceleration (experimental), None for plain torch.
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
        """Put hooks and replacements in place, all of them or none."""
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
        """Restore the model as `attach` found it. A second call does nothing.

        Raises:
            RuntimeError: when somebody else replaced a method of the model in the meantime; undo that first.
        """
        for step in self._undo:
            if isinstance(step, Patch) and step.place() is None:
                step.remove()  # raises
        while self._undo:
            self._undo.pop().remove()
        self.model.__dict__.pop(ATTRIBUTE, None)

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

    Works before and after `accelerate` dispatches the model, and on the model inside a PeftModel. Compile afterwards.

    On an attached model, the logits of a forward with images are those of the remaining tokens: the last n logits
    belong to the last n input ids, n being the number of tokens after the image. `labels` are refused.

    Args:
        model: haotian-liu/LLaVA's LlavaLlamaForCausalLM or LlavaMistralForCausalLM, or transformers'
            LlavaForConditionalGeneration, LlavaNextForConditionalGeneration or LlavaOnevisionForConditionalGeneration
            with a Llama, Mistral, Qwen2 or Qwen3 language model. Or a transformers pipeline of one of the latter.
        method: a name (`llava_prune.names()`) or a Method instance.
        check: verify every cut on the host (for tests of new methods; slow).
        graphs: experimental, see llava_prune.experimental: replay captured CUDA graphs.
        text_step: experimental, with graphs: round text lengths up to a multiple.
        fused: experimental: cuts by Triton kernels.
        hyper: hyper-parameters when `method` is a name.

    Returns:
        Handle.

    Raises:
        ValueError: unknown method or value, a model that is not supported or does not have what the method needs, a
            model that is pruned already, or acceleration that the device does not have. Nothing is changed then.
    """
    method = _built(method, hyper)
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
        handle.vision.text_tower = text_tower(folder)
    if graphs or fused or text_step is not None:
        from .experimental.engine import Engine

        handle.engine = Engine(method, model.device, graphs, text_step, fused)
    handle.install(family)
    return handle


def _built(method: str | Method, hyper: dict[str, Any]) -> Method:
    """The instance that `attach` was asked for."""
    if isinstance(method, str):
        return build(method, **hyper)
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is neither a method's name nor a Method")
    if hyper:
        raise ValueError(f"hyper-parameters {sorted(hyper)} go with a method's name; {method!r} is built already")
    return method


def attached_handle(model: Any) -> Handle | None:
    """The handle of an attached model, None for any other."""
    found: Handle | None = peel(model).__dict__.get(ATTRIBUTE)
    return found


def detach(model: Any) -> None:
    """Restore an attached model, also a copy of one, for which no handle is at hand.

    Raises:
        ValueError: when no method is attached.
    """
    handle = attached_handle(model)
    if handle is None:
        raise ValueError(f"no method is attached to this {type(model).__name__}")
    handle.detach()


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
