"""What each method is asked for on the random models of tests/models.py: 6 layers, 36 visual tokens.

A method that has no line here runs with `tokens=12`, keeps everything with `tokens=36`, and must pass all suites.
Add a line only where its arguments are others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import llava_prune
from tests.models import PATCHES


@dataclass(frozen=True)
class Setting:
    """Arguments of one method.

    Attributes:
        hyper: prunes clearly.
        keep_all: prunes nothing; None when the method has no such setting.
        prunes: False for a method that leaves every token in.
    """

    hyper: dict[str, Any] = field(default_factory=lambda: {"tokens": 12})
    keep_all: dict[str, Any] | None = field(default_factory=lambda: {"tokens": PATCHES})
    prunes: bool = True


SETTINGS: dict[str, Setting] = {
    "full": Setting({}, {}, prunes=False),
    # a first layer with all of two images costs 12 tokens on average
    "fastv": Setting({"tokens": 16}),
    "pdrop": Setting({"tokens": 16}),
    "topv": Setting({"tokens": 16}),
    "dart": Setting({"tokens": 16}),
    "text-only": Setting({}, None),
    "fastervlm+topv": Setting({"tokens": 16}),
}

COMPOSITIONS = ["visionzip+autoprune", "fastervlm+topv", "prumerge++pdrop", "tome+sparsevlm"]
"""A class token and merged rows; places of patches; counts that the data decide; another tower and recycling."""
COMPOSITIONS += ["divprune+dart", "holov+autoprune"]
"""First parts at the entry of the language model, before one that keeps positions and one that renumbers them."""
NAMES = [*llava_prune.names(), *COMPOSITIONS]


def setting(name: str) -> Setting:
    """The arguments of `name`."""
    return SETTINGS.get(name, Setting())
