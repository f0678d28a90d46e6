"""What several tests share."""

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
if not torch.cuda.is_available():  # the kernels are interpreted then; triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # tests import tests.models


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Take back what a test registers."""
    import llava_prune
    from llava_prune.methods import registry

    llava_prune.names()  # all of the package's own are there before
    tables = registry._METHODS, registry._PRESETS
    kept = [dict(t) for t in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_path(root: Path) -> Path:
    """The embedded checkpoint, which must be there."""
    path = root / "playground" / "models" / "llava-tiny"
    assert (path / "config.json").is_file(), f"{path} is part of the repository and is missing"
    return path


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Any]:
    """One random model of each class for the session: "llava", "hf", "next". Leave them as you found them.

    "llava" is left out where its package is missing.
    """
    from tests import models

    made = {"hf": models.tiny_hf(), "next": models.tiny_next()}
    return made | ({"llava": models.tiny_llava()} if importlib.util.find_spec("llava") else {})


@pytest.fixture(params=["llava", "hf"])
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, Any]) -> Any:
    """The random model of package llava, then that of transformers; both have the same weights."""
    if request.param not in tiny_models:
        pytest.skip(f"package {request.param} is not installed")
    return tiny_models[request.param]


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits of the last column for what `tests.models.inputs` gave, without a gradient."""

    def last(model: Any, given: dict[str, Any], **more: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(**given, **more).logits[:, -1]

    return last
