"""Every contract test runs for every method; most run in both families."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.settings import NAMES, Setting, setting


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a method."""
    return request.param


@pytest.fixture
def chosen(name: str) -> Setting:
    """The arguments of the method for the small models."""
    return setting(name)


@pytest.fixture
def hyper(chosen: Setting) -> dict[str, Any]:
    """The arguments with which the method prunes."""
    return chosen.hyper
