"""Replace a method of an instance and put it back, also where accelerate has wrapped it in the meantime."""

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
        ours: what replaced it.
        before: what the instance itself had, None for nothing.
    """

    owner: Any
    name: str
    ours: Any
    before: Any

    def place(self) -> str | None:
        """The attribute that holds the replacement now, None when somebody else replaced it.

        accelerate keeps the forward that it wraps as `_old_forward`, so the replacement moves there when a model is
        dispatched after `attach`, and back when the hooks are removed.
        """
        for name in (self.name, "_old_forward"):
            if self.owner.__dict__.get(name) is self.ours:
                return name
        return None

    def remove(self) -> None:
        """Put back what was there.

        Raises:
            RuntimeError: when somebody else replaced the attribute.
        """
        place = self.place()
        if place is None:
            raise RuntimeError(
                f"{type(self.owner).__name__}.{self.name} is not the one that attach set; undo the later change first"
            )
        if self.before is not None:
            setattr(self.owner, place, self.before)
        elif place == self.name:
            self.owner.__dict__.pop(place)
        else:  # under accelerate's wrapper there has to be something
            setattr(self.owner, place, stock(self.owner, self.name))


def stock(owner: Any, name: str) -> Any:
    """The method of the instance's class, bound."""
    return getattr(type(owner), name).__get__(owner)


def replace_method(owner: Any, name: str, function: Callable[..., Any], *args: Any) -> Patch:
    """Make `owner.name(...)` call `function(*args, previous, ...)`, `previous` being what it called before.

    `function` must be a module-level function, so that models with a replaced method can be copied and saved. A forward
    that accelerate has wrapped is replaced inside the wrapper, which moves inputs to the right device as ever.
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
    """Where a module computes: as accelerate's hook says, else where its weights are."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):  # several in one, or one, or none
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(module.parameters(), None)
    return default if parameter is None or parameter.is_meta else parameter.device
