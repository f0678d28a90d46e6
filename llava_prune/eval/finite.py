"""Watch a model for NaN and infinite values while it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.base import peel
from ..models.family import family_of

TOWER, PROJECTOR = "the vision tower", "the projector"


class Logits:
    """Records which samples of the last request had NaN or infinite logits at any new token."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def see(self, module: Any, inputs: Any, logits: Tensor) -> None:
        """Check the last position of (B, L, V) logits without a host synchronisation.

        This is a forward hook of the output embeddings.
        """
        bad = ~logits[:, -1].isfinite().all(-1)  # (B,)
        self._bad = bad if self._bad is None or len(self._bad) != len(bad) else self._bad | bad

    def take(self) -> list[bool]:
        """Return one flag for each sample of the last request, and reset."""
        bad, self._bad = self._bad, None
        return [] if bad is None else bad.tolist()


@contextmanager
def watched(loaded: Any) -> Iterator[Logits]:
    """Watch the logits of every request in the block."""
    seen = Logits()
    hook = loaded.model.get_output_embeddings().register_forward_hook(seen.see)
    try:
        yield seen
    finally:
        hook.remove()


def locate(loaded: Any, ask: Callable[[], Any]) -> str:
    """Run `ask` and return the name of the first module whose output has NaN or infinite values, for a message."""
    found: list[str] = []

    def see(name: str, module: Any, inputs: Any, output: Any) -> None:
        if name == PROJECTOR and not _finite(inputs[0]):  # the tower is not hooked: cached images do not pass it
            found.append(TOWER)
        states = output[0] if isinstance(output, (tuple, list)) else output
        if not _finite(states if name == PROJECTOR else states[:, -1]):
            found.append(name)

    with ExitStack() as stack:
        for name, module in _modules(loaded):
            stack.callback(module.register_forward_hook(partial(see, name)).remove)
        ask()
    return found[0] if found else "the output embeddings"


def _finite(states: Any) -> bool:
    """Return whether all values are finite; True for an output that is not a tensor."""
    return not isinstance(states, Tensor) or bool(torch.isfinite(states).all())


def _modules(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Yield the projector and the decoder layers, each with its name for a message."""
    model = peel(loaded.model)
    family = family_of(model)
    yield PROJECTOR, family.projector(model)
    for number, layer in enumerate(family.language_model(model).layers):
        yield f"layer {number} of the language model", layer
