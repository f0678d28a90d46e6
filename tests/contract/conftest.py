"""Every contract test runs for every method; most run in both families."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.settings import NAMES, Setting, setting


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """A method's name."""
    return request.param


@pytest.fixture
def chosen(name: str) -> Setting:
    """Its arguments for the small models."""
    return setting(name)


@pytest.fixture
def hyper(chosen: Setting) -> dict[str, Any]:
    """Those that prune."""
    return chosen.hyper
