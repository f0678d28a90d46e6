"""Acceleration that no GPU has run: these tests carry the marker `experimental` and are left out by default."""

from __future__ import annotations

from typing import Any

import pytest

from llava_prune.experimental import graphs
from tests.contract.settings import NAMES, setting
from tests.experimental.tape import Recorder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "experimental" in item.path.parts:
            item.add_marker(pytest.mark.experimental)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> Any:
    """A method's name."""
    return request.param


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Takes the place of CUDA graphs."""
    made = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: made)
    return made


@pytest.fixture
def chosen(name: str) -> Any:
    """Its arguments for the small models."""
    return setting(name)


@pytest.fixture
def hyper(chosen: Any) -> Any:
    """Those that prune."""
    return chosen.hyper
