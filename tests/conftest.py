"""Fixtures and settings of all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # small models: more threads only wait for each other
if not torch.cuda.is_available():  # kernels are then interpreted; triton reads this at its first import
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # tests import tests.models


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Restore the registry of methods after the test."""
    import llava_prune
    from llava_prune.methods import registry

    llava_prune.names()  # registers all of the package's own methods
    tables = registry._METHODS, registry._PRESETS
    kept = [dict(t) for t in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_path(root: Path) -> Path:
    """The folder of the checkpoint llava-tiny, which is part of the repository."""
    path = root / "playground" / "models" / "llava-tiny"
    assert (path / "config.json").is_file(), f"{path} is part of the repository and is missing"
    return path


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Any]:
    """One random model of each class for the session: "llava", "hf", "next". Tests must not change them.

    "llava" is left out where its package is missing.
    """
    from tests import models

    made = {"hf": models.tiny_hf(), "next": models.tiny_next()}
    return made | ({"llava": models.tiny_llava()} if importlib.util.find_spec("llava") else {})


@pytest.fixture(params=["llava", "hf"])
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, Any]) -> Any:
    """The random model of package llava, then that of transformers, with the same weights."""
    if request.param not in tiny_models:
        pytest.skip(f"package {request.param} is not installed")
    return tiny_models[request.param]


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Return a function that computes the logits of the last column for the output of `tests.models.inputs`."""

    def last(model: Any, given: dict[str, Any], **more: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(**given, **more).logits[:, -1]

    return last
