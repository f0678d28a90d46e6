"""Whether a run is finished with the same settings, told from files alone: no model is loaded, no image is opened.

A result carries a stamp: a checksum over everything that was asked for, the packages and their code, and name, size and
time of modification of every file that the answers depend on. Where it differs, the evaluation compares the contents
themselves (see `identity`), so an old stamp costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import llava_prune

from ..methods.planner import Run
from ..models.load import resolve
from . import identity
from .answers import ANSWERS, RESULT, SCORES
from .plan import Settings
from .task import Sources, Task

ASKED = ("family", "batch", "dtype", "attn", "device_map", "load_8bit", "load_4bit")
"""Settings that decide how a model is loaded, as they were given."""


Stamp = Callable[[Run], str | None]


def stamps(settings: Settings, task: Task) -> Stamp:
    """The stamp of each run of a benchmark; None where files alone do not tell (engines, checkpoints not at hand)."""
    places = _places(settings, task)
    if places is None or settings.engine is not None:
        return lambda run: None
    device = (settings.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    shared = {
        "asked": {name: getattr(settings, name) for name in ASKED},
        "device": device,
        "versions": identity.versions(),
        "code": _facts([Path(llava_prune.__file__).parent], "*.py"),
        "files": _facts(places, "*"),
    }
    return lambda run: _sha({**shared, "run": identity.chosen(settings, task, run)})


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _places(settings: Settings, task: Task) -> list[Path] | None:
    """Files and folders that the answers to a benchmark depend on; None where they are not at hand."""
    try:
        models = [resolve(m) for m in (settings.model, settings.model_base) if m is not None]
        sources = Sources(task, Path(settings.data).expanduser())
        found = [sources.find(kind) for kind in task.files]
    except (ValueError, OSError):
        return None
    return [*models, *(place for place in found if place is not None)]


def _facts(places: Iterable[Path], pattern: str) -> str:
    """Checksum over path, size and time of modification of files, and of those below folders."""
    h = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob(pattern)) if place.is_dir() else [place]:
            if path.is_file():
                facts = path.stat()
                h.update(f"{path}:{facts.st_size}:{facts.st_mtime_ns};".encode())
    return h.hexdigest()


def file_sha(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored_result(folder: Path, stamp: str | None) -> dict[str, Any] | None:
    """The result in a run's folder, where its stamp is this one and the answer file is the one it was made from."""
    if stamp is None:
        return None
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        same = found["stamp"] == stamp and found["answers_sha256"] == file_sha(folder / ANSWERS)
        same = same and (folder / SCORES).is_file()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(found) if same else None
