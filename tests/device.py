"""A stand-in for a GPU: tensors that report another device and are computed on the CPU.

An operation on tensors of two devices is an error, as on a GPU. Everything that makes the host wait for a GPU is
logged: reads of a tensor, and copies to the device that do not set `non_blocking`, such as lists used as indices.
Registering a device changes a process permanently, so only a process of its own may import this module.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
waits: list[str] = []
"""The waits of llava_prune itself so far, each as "file:function"."""


class StandIn(Tensor):
    """A tensor on the stand-in device; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> StandIn:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        new: StandIn = Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        new.inner = inner
        return new

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandIn({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _wait() -> None:
    """Log a wait if the code that caused it is a part of llava_prune, not of torch or a package that it calls."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" in frame.filename or frame.filename == __file__:
            continue
        if "/llava_prune/" in frame.filename:
            waits.append(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}")
        return


def _is_stand_in(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU; the result is on the stand-in device if its inputs are, or if `device` names it."""
    name, tensors = str(func), [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [t for t in tensors if isinstance(t, StandIn)]
    on_host = [t for t in tensors if not isinstance(t, StandIn)]
    device = kwargs.get("device")
    to_here, copies = _is_stand_in(device), name.startswith(("aten._to_copy", "aten.copy_"))
    if not here and not to_here:
        return func(*args, **kwargs)
    if here and not copies and any(t.dim() for t in on_host):
        raise RuntimeError(f"{name} of tensors on two devices: {[(tuple(t.shape), str(t.device)) for t in tensors]}")
    leaves = copies and bool(here) and device is not None and not to_here
    blocking = copies and bool(on_host) and not (kwargs.get("non_blocking") or (*args, False, False)[2])
    if leaves or blocking or "_local_scalar_dense" in name:
        _wait()
    plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, StandIn) else x, (args, kwargs))
    if device is not None:
        plain_kwargs["device"] = torch.device("cpu")
    out = func(*plain_args, **plain_kwargs)
    if leaves:
        return out
    if func._schema.is_mutable and name.split(".")[1].endswith("_"):
        return args[0]
    return tree_map(lambda x: StandIn(x) if isinstance(x, Tensor) else x, out)


class _Operators(TorchDispatchMode):
    """Creates tensors on the stand-in device, for functions without a tensor argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Functions that reach a device without an operator: torch.tensor, tolist, and lists as indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_stand_in(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], StandIn):
            _wait()
            return args[0].inner.tolist()
        if func is Tensor.__getitem__ and isinstance(args[0], StandIn):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return func(args[0], tuple(torch.tensor(i).to(DEVICE) if isinstance(i, list) else i for i in index))
        return func(*args, **kwargs)


@contextmanager
def standing_in() -> Iterator[None]:
    """Make the stand-in device usable in the block; inference mode, which it does not support, becomes no_grad."""
    stock = torch.inference_mode
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[assignment, misc]
    try:
        with _Functions(), _Operators():
            yield
    finally:
        torch.inference_mode = stock  # type: ignore[misc]
