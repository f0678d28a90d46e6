"""What several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
