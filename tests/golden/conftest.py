"""The model of the recorded vectors, in both families.

GOLDEN_DEVICE=cuda puts it on a GPU, with TF32 switched off for convolutions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_prune
from tests.golden.reference import write_reference

DEVICE = os.environ.get("GOLDEN_DEVICE", "cpu")


@pytest.fixture(scope="session", autouse=True)
def whole_float32() -> Iterator[None]:
    """Switch off TF32, to which cuDNN rounds float32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def load(folder: Path, family: str) -> Any:
    """Load the checkpoint in a family; skip the test where package llava is missing."""
    if family == "llava":
        pytest.importorskip("llava")
    return llava_prune.load(folder, family=family, dtype="float32", device=DEVICE)


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the reference model in haotian-liu/LLaVA's format."""
    return write_reference(tmp_path_factory.mktemp("reference") / "model")


@pytest.fixture(scope="session", params=["llava", "hf"])
def deep_reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference model with a vision tower of 24 blocks."""
    folder = write_reference(tmp_path_factory.mktemp("deep") / "model", deep=True)
    return load(folder, request.param)


@pytest.fixture(scope="session", params=["llava", "hf"])
def reference(request: pytest.FixtureRequest, reference_folder: Path) -> Any:
    """The reference model in package llava's classes, then in transformers'."""
    return load(reference_folder, request.param)
