"""Decide from files alone whether a run is finished with the same settings; no model is loaded and no image is opened.

A result carries a stamp: a checksum over all requested settings, the packages and their code, and the name, size and
modification time of every file that the answers depend on. If the stamps differ, the evaluation compares the contents
themselves (see `identity`), so an outdated stamp costs time but never gives a wrong result.
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
from ..models.files import read_json
from ..models.load import resolve
from . import identity
from .answers import ANSWERS, RESULT, SCORES
from .plan import Settings
from .task import Sources, Task, questions_of

ASKED = ("model", "model_base", "family", "batch", "dtype", "attn", "device_map", "load_8bit", "load_4bit", "engine")
"""Settings that decide which model is loaded and how; `asked` returns them as given."""
Origin = dict[str, Any]
"""The part of a result that says where it comes from: `asked` and `stamp`."""


def asked(settings: Settings) -> dict[str, Any]:
    """Return the requested model, data, device and precision: all settings but methods and benchmark."""
    device = (settings.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    data = str(Path(settings.data).expanduser().resolve())
    return {**{name: getattr(settings, name) for name in ASKED}, "device": device, "data": data}


def origins(settings: Settings, task: Task) -> Callable[[Run], Origin]:
    """Return a function from a run of a benchmark to its origin.

    The stamp is None if files alone cannot identify the run: with an engine, or if checkpoint or data are not on disk.
    """
    places, given = _places(settings, task), asked(settings)
    if places is None or settings.engine is not None:
        return lambda run: {"asked": given, "stamp": None}
    code = [p for p in Path(llava_prune.__file__).parent.rglob("*") if p.suffix in (".py", ".yaml")]
    shared = {"asked": given, "versions": identity.versions(), "files": _facts([*sorted(code), *places])}

    def origin(run: Run) -> Origin:
        stamp = identity.checksum({**shared, "run": identity.chosen(settings, task, run)})
        return {"asked": given, "stamp": stamp}

    return origin


def _places(settings: Settings, task: Task) -> list[Path] | None:
    """Return the files and folders that the answers to a benchmark depend on; None if some are not on disk."""
    try:
        models = [resolve(m) for m in (settings.model, settings.model_base) if m is not None]
        models += [tower for tower in map(_tower, models) if tower is not None]
        sources = Sources(task, Path(settings.data).expanduser())
        found = [sources.find(kind) for kind in task.files if kind != "images"]
        asked_about = sources.image_files(questions_of(sources)[: settings.limit]) if "images" in task.files else []
    except (ValueError, OSError):
        return None
    return [*models, *(place for place in found if place is not None), *asked_about]


def _tower(checkpoint: Path) -> Path | None:
    """Return the folder of a vision tower outside a checkpoint: a local folder, or that of a hub id in the cache."""
    from huggingface_hub import try_to_load_from_cache

    name = read_json(checkpoint / "config.json").get("mm_vision_tower")
    if not isinstance(name, str):
        return None
    if (checkpoint / name).is_dir() or Path(name).is_dir():  # for an absolute name, both are the same folder
        return checkpoint / name if (checkpoint / name).is_dir() else Path(name)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    return Path(cached).parent if isinstance(cached, str) else None


def _facts(places: Iterable[Path]) -> str:
    """Return a checksum over path, size and modification time of files, and of all files below folders."""
    h = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                facts = path.stat()
                h.update(f"{path}:{facts.st_size}:{facts.st_mtime_ns};".encode())
    return h.hexdigest()


def file_sha(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made(folder: Path, exports: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of each file of a run, by its path in the run's folder."""
    files = [folder / ANSWERS, folder / SCORES, *exports]
    return {path.relative_to(folder).as_posix(): file_sha(path) for path in files}


def stored_result(folder: Path, stamp: str | None) -> dict[str, Any] | None:
    """Return the result in a run's folder if its stamp is this one and the files beside it are unchanged; else None."""
    if stamp is None:
        return None
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        same = found["stamp"] == stamp and all(file_sha(folder / n) == sha for n, sha in found["made"].items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(found) if same else None
