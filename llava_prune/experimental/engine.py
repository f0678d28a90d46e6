"""Acceleration of pruned requests; the only module of this folder that the rest of the package imports.

Nothing here has been tested on a GPU. `attach(..., graphs=True)` captures prefills and decoding steps as CUDA graphs
and replays them; `attach(..., fused=True)` replaces the operations of a cut by Triton kernels.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..methods.base import Method

OLDEST = "3.3"
"""Oldest supported version of triton."""


class Engine:
    """The acceleration of the requests of an attachment.

    Args:
        method: the pruning method.
        device: device of the model.
        graphs: True to capture and replay CUDA graphs; or a `Graphs` made for the same method, which can be shared by
            several attachments.
        text_step: round text lengths up to a multiple, see `Graphs`.
        fused: replace the small operations of a cut by Triton kernels.

    Attributes:
        kernels: the module of kernels, None for plain torch.
        graphs: the captured graphs, None if nothing is captured.

    Raises:
        ValueError: for a device that does not support the acceleration, or arguments that contradict each other.
    """

    def __init__(self, method: Method, device: torch.device, graphs: Any, text_step: int | None, fused: bool) -> None:
        from .graphs import Graphs, check_step

        check_step(text_step, graphs is True)
        self.kernels = load_kernels(device) if fused else None
        self.graphs = graphs if isinstance(graphs, Graphs) else None
        if graphs and self.graphs is None:
            self.graphs = Graphs(method, device, text_step)
        if self.graphs is not None and self.graphs.method is not method:
            raise ValueError(f"these graphs are of {self.graphs.method!r}, not of {method!r}; give graphs=True")

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which triton launches kernels on `device`."""
        return torch.cuda.device(device) if self.kernels is not None and device.type == "cuda" else nullcontext()

    def prefill(self, lm: Any, handle: Any, prompt: Any, cache: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """Replay a prefill, fill the cache, and return (states, decode state, trace); None if it cannot be replayed."""
        if self.graphs is None or handle.check:
            return None
        return self.graphs.run(lm, self.kernels, prompt, cache, hidden, kwargs)

    def step(self, decode: Any, cache: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Replay a decoding step and return (B, 1, D) states; None if it cannot be replayed."""
        return None if self.graphs is None else self.graphs.step(decode, cache, hidden, kwargs)


def load_kernels(device: torch.device) -> Any:
    """Import and return the module of the kernels.

    Raises:
        ValueError: if triton is missing or older than OLDEST, or for a device other than CUDA (with TRITON_INTERPRET=1
            any device is accepted, slowly).
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"fused=True needs a CUDA device, and the model is on {device}; leave fused out")
    try:
        import triton

        if Version(triton.__version__) < Version(OLDEST):
            raise ImportError(f"this is {triton.__version__}")
        from . import kernels
    except ImportError as error:
        raise ValueError(f"fused=True needs triton >= {OLDEST} ({error}): install it, or leave fused out") from error
    return kernels
