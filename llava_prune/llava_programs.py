"""Run LLaVA's own programs (`llava.eval.*`, `llava.serve.*`), unchanged, with every model they load pruned."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
import logging
import runpy
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from .handle import attach
from .llava_scripts import package_folders, run_script
from .methods.registry import build, resolve
from .models.config import pick_dtype, weight_bytes

log = logging.getLogger(__name__)

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "google": "protobuf",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
"""Module -> package on PyPI, if the names differ."""

REINTERPRET = (torch.Tensor.view, torch.frombuffer, torch.from_file)
"""Functions whose dtype argument says how stored bytes are read."""


class OnCPU(TorchFunctionMode):
    """A torch function mode that runs code for CUDA and float16, such as LLaVA's programs, on the CPU.

    A torch function mode applies only to the thread that enters it. Therefore `start` replaces
    `threading.Thread.start`, so that the mode also applies to the threads of the program.

    Attributes:
        dtype: dtype that replaces float16, which is slow on a CPU.
    """

    dtype: torch.dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.local()

    def _swap(self, value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
            return "cpu"
        return self.dtype if value is torch.float16 else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._suspended or func in REINTERPRET:
            return func(*args, **(kwargs or {}))
        kwargs = {k: self._swap(v) if k in ("device", "dtype") else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *map(self._swap, args[1:]))
        return func(*args, **kwargs)

    @property
    def _suspended(self) -> bool:
        return getattr(self._thread, "suspended", False)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Replace nothing in this thread and in threads that it starts, so that weights are read as they are stored."""
        before = self._suspended
        self._thread.suspended = True
        try:
            yield
        finally:
            self._thread.suspended = before

    def load(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """Call torch.load with the dtypes of the file: a stored float16 tensor stays float16 until it is cast."""
        with self.suspended():
            return stock(*args, **kwargs)

    def start(self, stock: Any, thread: threading.Thread) -> None:
        """Start a thread that runs in this mode; a replacement of threading.Thread.start."""
        if self._suspended:
            stock(thread)
            return
        body = thread.run

        def run() -> None:
            del thread.run  # restores the `run` of the class
            with self:
                body()

        thread.run = run  # type: ignore[method-assign]
        stock(thread)

    def cast(self, model: Any, weights: Path, config: Path) -> None:
        """Cast a model that was loaded in float16 to the dtype that `llava_prune.load` would choose.

        From then on, that dtype replaces float16 everywhere.

        Args:
            model: the model.
            weights: folder of its weight files.
            config: its config.json.
        """
        values = json.loads(config.read_text(encoding="utf-8"))
        self.dtype = pick_dtype(None, values, torch.device("cpu"), weight_bytes(weights))
        model.to(self.dtype)


def run(argv: Sequence[str], method: str = "autoprune", hyper: dict[str, Any] | None = None) -> None:
    """Run a module of package llava in this process, as `python -m` would.

    Every model loaded with llava's `load_pretrained_model` is pruned. A vision tower that the checkpoint names by a
    relative path is loaded from the folder of the checkpoint or of its --model-base. Without CUDA the program runs on
    the CPU, in the dtype that `llava_prune.load` would choose.

    Args:
        argv: ["python", "-m", "llava.eval.model_vqa_loader", ...], with or without the first two.
        method: name of the method.
        hyper: hyper-parameters of the method.

    Raises:
        ValueError: for an unknown method or an invalid value, a module that package llava does not have, or a missing
            package that the program needs.
    """
    words = list(argv)
    if len(words) >= 2 and Path(words[0]).name.startswith("python") and words[1] == "-m":
        words = words[2:]
    if not words or not words[0].startswith("llava."):
        raise ValueError(
            f"{' '.join(argv)!r} is not a module of package llava; give one, e.g. "
            "python -m llava.eval.model_vqa_loader ..."
        )
    _check_module(words[0])
    budget = resolve(method)[1].get("tokens")
    if budget is not None and "tokens" in (hyper or {}):
        raise ValueError(f"{method} states tokens={budget} itself; leave out either the preset or the budget")
    build(method, **(hyper or {}))  # raises before the model is loaded
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):  # restored later, since LLaVA's servers replace them by loggers
            stack.enter_context(mock.patch.object(sys, name, getattr(sys, name)))
        stack.enter_context(_patched(method, hyper or {}))
        stack.enter_context(mock.patch.object(sys, "argv", words))
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except ImportError as error:
            raise ValueError(f"{words[0]} cannot run: {_absent(error)}") from error


def _check_module(name: str) -> None:
    """Refuse a name that is not a module of package llava, suggesting the nearest modules."""
    names: list[str] = []
    for folder in package_folders():
        names += [".".join(("llava", *f.relative_to(folder).with_suffix("").parts)) for f in folder.rglob("*.py")]
    if name not in names or name.endswith(".__init__"):
        programs = sorted(n for n in names if n.startswith(("llava.eval.", "llava.serve.")) and "__init__" not in n)
        near = difflib.get_close_matches(name, programs, 3, 0.8) or ["llava.eval.model_vqa_loader"]
        raise ValueError(f"package llava has no module {name}; give one that it has, as {' or '.join(near)}")


def _absent(error: ImportError) -> str:
    """Return what is missing after a failed import, and how to install it."""
    top = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and top and error.name == top:
        return f"package {top} is not installed; pip install {DISTRIBUTIONS.get(top, top)}"
    text = " ".join(str(error).split())
    return f"{text}; install a version of {top} that has it" if top and top != "llava" else text


@contextlib.contextmanager
def _patched(method: str, hyper: dict[str, Any]) -> Iterator[None]:
    """Patch llava's model loader to attach the method, and its tower builder to find towers inside a checkpoint."""
    try:
        import llava.model.builder as builder
        import llava.model.llava_arch as arch
    except ImportError as error:
        hint = "pip install accelerate requests tqdm"
        raise ValueError(f"package llava cannot be imported ({hint}): {_absent(error)}") from error
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
            starting = functools.partialmethod(_start, cpu, threading.Thread.start)
            stack.enter_context(mock.patch.object(threading.Thread, "start", starting))
            stack.enter_context(cpu)
        try:
            yield
            if not handles:
                log.warning("nothing was pruned: the program loaded no model with llava's load_pretrained_model")
        finally:
            for handle in handles:
                _report(handle)
                handle.detach()


def _start(thread: threading.Thread, cpu: OnCPU, stock: Any) -> None:
    cpu.start(stock, thread)


def _report(handle: Any) -> None:
    """Log the token counts of the last prompt, or that nothing was pruned."""
    if handle.last is None:
        log.warning("%r pruned nothing: no prompt had an image, or the last one with an image failed", handle.method)
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
    """Load a model with llava's loader and attach the method; a replacement of `load_pretrained_model`."""
    current[:] = [Path(path).expanduser() for path in (model_path, model_base) if path]
    if cpu is not None:
        kwargs["device"] = "cpu"
    with contextlib.nullcontext() if cpu is None else cpu.suspended():
        tokenizer, model, processor, length = stock(model_path, model_base, *args, **kwargs)
    if cpu is not None:
        cpu.cast(model, _files(model_base or model_path), _files(model_path) / "config.json")
    handles.append(attach(model, method, **hyper))
    return tokenizer, model, processor, length


def _files(path: str) -> Path:
    """Return the folder of a loaded checkpoint; for a hub id, its folder in the cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, local_files_only=True))


def _tower(stock: Any, current: list[Path], config: Any, **kwargs: Any) -> Any:
    """Build a vision tower, which may be inside the checkpoint; a replacement of `build_vision_tower`."""
    name = getattr(config, "mm_vision_tower", None)
    inside = [folder / name for folder in current if name and (folder / name).is_dir()]
    if inside:
        config.mm_vision_tower = str(inside[0].resolve())
    return stock(config, **kwargs)


def command(args: argparse.Namespace) -> int:
    """Run `llava-prune run` and return its exit status.

    Raises:
        ValueError: for bad input.
    """
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise ValueError("no program given; write it after --, e.g. -- python -m llava.eval.run_llava ...")
    if not (Path(program[0]).name.startswith("python") or program[0].startswith("llava.")):
        return run_script(program, [a for a in args.argv[1 : len(args.argv) - len(args.program)] if a != "--"])
    hyper = dict(args.method_args)
    if args.tokens is not None:
        if "tokens" in hyper:
            raise ValueError(f"tokens is given twice, as --tokens {args.tokens} and in METHOD_ARGS; give it once")
        hyper["tokens"] = args.tokens
    run(program, args.method, hyper)
    return 0
