"""Training-free pruning of visual tokens for LLaVA. Importing changes nothing anywhere."""

from __future__ import annotations

from .core.method import Method
from .core.registry import build, names, register
from .core.types import Cut, Fold, Spans, View, VisionCut, VisionView
from .families.load import Loaded, load
from .runtime.attach import Handle, attach, pruned
from .runtime.door import image_sizes
from .runtime.request import Record

__version__ = "0.1.0"

__all__ = [
    "Cut",
    "Fold",
    "Handle",
    "Loaded",
    "Method",
    "Record",
    "Spans",
    "View",
    "VisionCut",
    "VisionView",
    "attach",
    "build",
    "image_sizes",
    "load",
    "names",
    "pruned",
    "register",
]
