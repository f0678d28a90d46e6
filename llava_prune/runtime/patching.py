"""Replace a method of an instance and restore it, even if accelerate has wrapped it in the meantime."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Patch:
    """A replaced attribute of an instance.

    Attributes:
        owner: the instance.
        name: the attribute.
        ours: the replacement.
        before: the value that the instance itself had before, None if it had none.
    """

    owner: Any
    name: str
    ours: Any
    before: Any

    def place(self) -> str | None:
        """Return the attribute that holds the replacement, or None if other code has replaced or deleted it.

        accelerate keeps the forward that it wraps as `_old_forward`, so the replacement moves there if a model is
        dispatched after `attach`, and moves back when accelerate's hooks are removed.
        """
        for name in (self.name, "_old_forward"):
            if self.owner.__dict__.get(name) is self.ours:
                return name
        return None

    def check(self) -> None:
        """Refuse to restore an attribute that is not the replacement.

        Raises:
            RuntimeError: if other code has replaced the attribute.
        """
        if self.place() is None and self.name in self.owner.__dict__:
            raise RuntimeError(
                f"{type(self.owner).__name__}.{self.name} is not the one that attach set; undo the later change first"
            )

    def remove(self) -> None:
        """Restore the previous value of the attribute, also if other code has deleted the replacement.

        Raises:
            RuntimeError: if other code has replaced the attribute.
        """
        self.check()
        place = self.place() or self.name
        if self.before is not None:
            setattr(self.owner, place, self.before)
        elif place == self.name:
            self.owner.__dict__.pop(place, None)
        else:  # accelerate's wrapper needs an `_old_forward`
            setattr(self.owner, place, stock(self.owner, self.name))


def stock(owner: Any, name: str) -> Any:
    """Return the method of the instance's class, bound to the instance."""
    return getattr(type(owner), name).__get__(owner)


def replace_method(owner: Any, name: str, function: Callable[..., Any], *args: Any) -> Patch:
    """Make `owner.name(...)` call `function(*args, previous, ...)`, where `previous` is the method before.

    `function` must be a module-level function, so that models with a replaced method can be copied and saved. A forward
    that accelerate has wrapped is replaced inside the wrapper, which continues to move inputs to the right device.
    """
    inside = name == "forward" and "_hf_hook" in owner.__dict__ and "_old_forward" in owner.__dict__
    place = "_old_forward" if inside else name
    previous = owner.__dict__.get(place)
    called = previous or stock(owner, name)
    ours = functools.partial(function, *args, called)
    ours.__wrapped__ = called  # type: ignore[attr-defined]  # generate() reads signatures
    setattr(owner, place, ours)
    return Patch(owner, name, ours, previous)


def execution_device(module: Any, default: torch.device) -> torch.device:
    """Return the device on which a module computes: that of accelerate's hook, else that of its weights."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):  # a sequence of hooks, a single hook, or None
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(module.parameters(), None)
    return default if parameter is None or parameter.is_meta else parameter.device
