"""Tests of llava_prune.experimental: they carry the marker `experimental` and are left out by default."""

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
    """The name of a method."""
    return request.param


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder that takes the place of CUDA graphs."""
    made = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: made)
    return made


@pytest.fixture
def chosen(name: str) -> Any:
    """The arguments of the method for the small models."""
    return setting(name)


@pytest.fixture
def hyper(chosen: Any) -> Any:
    """The arguments with which the method prunes."""
    return chosen.hyper
