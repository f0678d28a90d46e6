"""The arguments of each method for the random models of tests/models.py: 6 layers, 36 visual tokens.

A method that is not listed here runs with `tokens=12`, keeps everything with `tokens=36`, and must pass all suites.
Add a line only for a method that needs other arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import llava_prune
from tests.models import PATCHES


@dataclass(frozen=True)
class Setting:
    """The arguments of one method.

    Attributes:
        hyper: arguments that prune clearly.
        keep_all: arguments that prune nothing; None if the method has none.
        prunes: False for a method that keeps every token.
    """

    hyper: dict[str, Any] = field(default_factory=lambda: {"tokens": 12})
    keep_all: dict[str, Any] | None = field(default_factory=lambda: {"tokens": PATCHES})
    prunes: bool = True


SETTINGS: dict[str, Setting] = {
    "full": Setting({}, {}, prunes=False),
    # keeping all tokens of two images in a first layer costs 12 tokens on average
    "fastv": Setting({"tokens": 16}),
    "pdrop": Setting({"tokens": 16}),
    "topv": Setting({"tokens": 16}),
    "dart": Setting({"tokens": 16}),
    "text-only": Setting({}, None),
    "fastervlm+topv": Setting({"tokens": 16}),
}

COMPOSITIONS = ["visionzip+autoprune", "fastervlm+topv", "prumerge++pdrop", "tome+sparsevlm"]
"""In turn: class token and merged tokens, patch positions, counts that depend on the data, a changed tower and
recycling."""
COMPOSITIONS += ["divprune+dart", "holov+autoprune"]
"""Compositions whose first method acts at the entry of the language model; the second one keeps or renumbers
position ids."""
NAMES = [*llava_prune.names(), *COMPOSITIONS]


def setting(name: str) -> Setting:
    """Return the arguments of method `name`."""
    return SETTINGS.get(name, Setting())
