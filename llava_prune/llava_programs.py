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

from .handle import attach
from .methods.registry import build

log = logging.getLogger(__name__)

FULL_PRECISION_LIMIT = 3_000_000_000
"""Number of parameters up to which a model runs in float32 on a CPU; larger models run in bfloat16."""


class OnCPU(TorchFunctionMode):
    """Runs code that names CUDA and float16, as LLaVA's programs do, on the CPU.

    Attributes:
        dtype: replaces float16, which is slow on a CPU.
    """

    dtype: torch.dtype = torch.float32
    _reading = False

    def _swap(self, value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
            return "cpu"
        return self.dtype if value is torch.float16 else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._reading:
            return func(*args, **(kwargs or {}))
        kwargs = {k: self._swap(v) if k in ("device", "dtype") else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *map(self._swap, args[1:]))
        return func(*args, **kwargs)

    def load(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """torch.load with the dtypes of the file: a stored float16 tensor is float16 until it is cast."""
        self._reading = True
        try:
            return stock(*args, **kwargs)
        finally:
            self._reading = False

    def cast(self, model: Any) -> None:
        """Cast a model that was loaded in float16, and use the same dtype for everything else."""
        small = sum(p.numel() for p in model.parameters()) <= FULL_PRECISION_LIMIT
        self.dtype = torch.float32 if small else torch.bfloat16
        model.to(self.dtype)


def run(argv: Sequence[str], method: str = "autoprune", hyper: dict[str, Any] | None = None) -> None:
    """Run a module of the llava package in this process, as `python -m` would.

    Every model that llava's `load_pretrained_model` loads is pruned. A vision tower that the checkpoint names by a
    relative path is loaded from inside the checkpoint or its --model-base. Without CUDA the program runs on the CPU.

    Args:
        argv: ["python", "-m", "llava.eval.model_vqa_loader", ...], with or without the first two.
        method: name of the method.
        hyper: its hyper-parameters.

    Raises:
        ValueError: for an unknown method or value, or a module outside package llava.
    """
    words = list(argv)
    if len(words) >= 2 and Path(words[0]).name.startswith("python") and words[1] == "-m":
        words = words[2:]
    if not words or not words[0].startswith("llava."):
        raise ValueError(
            f"{' '.join(argv)!r} is not a module of package llava; give one, e.g. "
            "python -m llava.eval.model_vqa_loader ..."
        )
    build(method, **(hyper or {}))  # raises before the model is loaded
    with _patched(method, hyper or {}), mock.patch.object(sys, "argv", [words[0], *words[1:]]):
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def _patched(method: str, hyper: dict[str, Any]) -> Iterator[None]:
    """Let llava's loader attach the method, and its tower builder find towers inside a checkpoint."""
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
            log.warning("no CUDA device: the program runs on the CPU")
            stack.enter_context(mock.patch.object(torch, "load", functools.partial(cpu.load, torch.load)))
            stack.enter_context(cpu)
        try:
            yield
        finally:
            for handle in handles:
                _report(handle)
                handle.detach()


def _report(handle: Any) -> None:
    if handle.last is None:
        log.warning("%r pruned nothing: no prompt of the program had an image", handle.method)
        return
    counts = [t.float().mean().item() for t in (handle.last.tokens_in, handle.last.tokens_out)]
    log.warning("%r: last prompt, mean of %.1f visual tokens entering and %.1f leaving a layer", handle.method, *counts)


def _load(
    stock: Any,
    method: str,
    hyper: dict[str, Any],
    handles: list[Any],
    current: list[Path],
    cpu: OnCPU | None,
    model_path: str,
    model_base: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    current[:] = [Path(path).expanduser() for path in (model_path, model_base) if path]
    if cpu is not None:
        kwargs["device"] = "cpu"
    tokenizer, model, processor, length = stock(model_path, model_base, *args, **kwargs)
    if cpu is not None:
        cpu.cast(model)
    handles.append(attach(model, method, **hyper))
    return tokenizer, model, processor, length


def _tower(stock: Any, current: list[Path], config: Any, **kwargs: Any) -> Any:
    name = getattr(config, "mm_vision_tower", None)
    inside = [folder / name for folder in current if name and (folder / name).is_dir()]
    if inside:
        config.mm_vision_tower = str(inside[0].resolve())
    return stock(config, **kwargs)
