"""Training-free pruning of visual tokens for LLaVA. Importing the package patches nothing and does not load torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handle import Handle, attach, detach, pruned
    from .methods.base import EntryMethod, Method, MethodInfo, ScoreMethod
    from .methods.registry import build, names, register
    from .methods.views import Spans, View, VisionCut, VisionView
    from .models.load import Loaded, load
    from .ops.merging import Merge
    from .ops.selection import Cut
    from .runtime.questions import questions
    from .runtime.record import Record
    from .runtime.sizes import image_sizes

__version__ = "0.1.0"

_HOME = {
    "handle": "attach detach pruned Handle",
    "methods.base": "EntryMethod Method MethodInfo ScoreMethod",
    "methods.registry": "build names register",
    "methods.views": "Spans View VisionCut VisionView",
    "models.load": "Loaded load",
    "ops.merging": "Merge",
    "ops.selection": "Cut",
    "runtime.questions": "questions",
    "runtime.record": "Record",
    "runtime.sizes": "image_sizes",
}
_MODULES = {name: module for module, listed in _HOME.items() for name in listed.split()}

__all__ = [
    "Cut",
    "EntryMethod",
    "Handle",
    "Loaded",
    "Merge",
    "Method",
    "MethodInfo",
    "Record",
    "ScoreMethod",
    "Spans",
    "View",
    "VisionCut",
    "VisionView",
    "attach",
    "build",
    "detach",
    "image_sizes",
    "load",
    "names",
    "pruned",
    "questions",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'llava_prune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
