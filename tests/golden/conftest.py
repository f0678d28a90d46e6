"""The model of the recorded vectors, in both families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llava_prune
from tests.golden.reference import write_reference


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint in haotian-liu/LLaVA's format."""
    return write_reference(tmp_path_factory.mktemp("reference") / "model")


@pytest.fixture(scope="session", params=["llava", "hf"])
def deep_reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with the tower of 24 blocks."""
    folder = write_reference(tmp_path_factory.mktemp("deep") / "model", deep=True)
    return llava_prune.load(folder, family=request.param, dtype="float32", device="cpu")


@pytest.fixture(scope="session", params=["llava", "hf"])
def reference(request: pytest.FixtureRequest, reference_folder: Path) -> Any:
    """`llava_prune.load` of it in package llava's classes, then in transformers'."""
    return llava_prune.load(reference_folder, family=request.param, dtype="float32", device="cpu")
