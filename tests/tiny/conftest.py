"""Paths of the miniature checkpoint and its questions."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Return the folder of the shipped checkpoint."""
    return ROOT / "playground" / "models" / "llava-tiny"


@pytest.fixture(scope="session")
def gqa_dir() -> Path:
    """Return the folder of the held-out questions."""
    return ROOT / "playground" / "data" / "mini" / "gqa"
