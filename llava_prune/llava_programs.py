"""Run LLaVA's own programs (`llava.eval.*`), unchanged, with every model they load pruned."""

from __future__ import annotations

import contextlib
import functools
import logging
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)


FULL_PRECISION_LIMIT = 3_000_000_000
"""Parameters up to which a CPU run is in float32; larger models stay at two bytes, as bfloat16."""


class OnCPU(TorchFunctionMode):
    """Sends what asks for CUDA and float16 to the CPU: LLaVA's programs name both in their code.

    Attributes:
        dtype: stands in for float16, which CPUs are slow at.
    """

    dtype: torch.dtype = torch.float32

    def _swap(self, value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
            return "cpu"
        return self.dtype if value is torch.float16 else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: self._swap(v) if k in ("device", "dtype") else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *map(self._swap, args[1:]))
        return func(*args, **kwargs)

    def settle(self, model: Any) -> None:
        """Cast a model that was loaded in float16, and remember to what."""
        small = sum(p.numel() for p in model.parameters()) <= FULL_PRECISION_LIMIT
        self.dtype = torch.float32 if small else torch.bfloat16
        model.to(self.dtype)


def run(argv: Sequence[str], method: str = "autoprune", hyper: dict[str, Any] | None = None) -> None:
    """Run a module of the llava package in this process, as `python -m` would.

    Models come from llava's own `load_pretrained_model` and are pruned as soon as they are loaded. A vision tower
    named by a relative path is looked for inside the checkpoint. Without CUDA everything runs on the CPU.

    Args:
        argv: ["python", "-m", "llava.eval.model_vqa_loader", ...] or without the first two.
        method: name of the method.
        hyper: its hyper-parameters.

    Raises:
        ValueError: for an unknown method or value, or a module that is not llava's.
    """
    from ..methods.registry import build

    words = list(argv)
    if len(words) >= 2 and Path(words[0]).name.startswith("python") and words[1] == "-m":
        words = words[2:]
    if not words or not words[0].startswith("llava."):
        raise ValueError(f"{' '.join(argv)!r}: give a module of LLaVA, as: python -m llava.eval.model_vqa_loader ...")
    build(method, **(hyper or {}))  # an error now, not after loading 13 GB
    with _patched(method, hyper or {}), mock.patch.object(sys, "argv", [words[0], *words[1:]]):
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def _patched(method: str, hyper: dict[str, Any]) -> Iterator[None]:
    """llava's loader attaches the method; its tower builder knows paths inside a checkpoint."""
    try:
        import llava.model.builder as builder
        import llava.model.llava_arch as arch
    except ImportError as error:
        hint = "pip install --no-deps llava-torch==1.2.2.post1"
        raise ValueError(f"package llava is not installed ({hint}): {error}") from error
    handles: list[Any] = []
    current: list[Path] = []
    cpu = None if torch.cuda.is_available() else OnCPU()
    with contextlib.ExitStack() as stack:
        loader = functools.partial(_load, builder.load_pretrained_model, method, hyper, handles, current, cpu)
        tower = functools.partial(_tower, arch.build_vision_tower, current)
        stack.enter_context(mock.patch.object(builder, "load_pretrained_model", loader))
        stack.enter_context(mock.patch.object(arch, "build_vision_tower", tower))
        if cpu is not None:
            log.warning("no CUDA: the program runs on the CPU")
            stack.enter_context(cpu)
        try:
            yield
        finally:
            for handle in handles:
                _report(handle)
                handle.detach()


def _report(handle: Any) -> None:
    if handle.last is None:
        log.warning("%r pruned nothing: the program asked about no picture", handle.method)
        return
    counts = [t.float().mean().item() for t in (handle.last.tokens_in, handle.last.tokens_out)]
    log.warning("%r: last prompt, %.1f visual tokens entering and %.1f leaving a layer", handle.method, *counts)


def _load(
    stock: Any,
    method: str,
    hyper: dict[str, Any],
    handles: list[Any],
    current: list[Path],
    cpu: OnCPU | None,
    path: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from ..handle import attach

    current[:] = [Path(path).expanduser()]
    if cpu is not None:
        kwargs["device"] = "cpu"
    tokenizer, model, processor, length = stock(path, *args, **kwargs)
    if cpu is not None:
        cpu.settle(model)
    handles.append(attach(model, method, **hyper))
    return tokenizer, model, processor, length


def _tower(stock: Any, current: list[Path], config: Any, **kwargs: Any) -> Any:
    name = getattr(config, "mm_vision_tower", None)
    inside = current[0] / name if current and name else None
    if inside is not None and inside.is_dir():
        config.mm_vision_tower = str(inside.resolve())
    return stock(config, **kwargs)
