"""What the hooks of a method return is checked: its form always, its values with check=True."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from llava_prune import Cut, Method, VisionCut
from tests import models

FEW = torch.arange(models.PATCHES).expand(2, -1) < 12


def refused(tiny: Any, message: str, check: bool = False, **defined: Any) -> None:
    """Assert that a request of a method with these hooks is refused, and that the model answers afterwards."""
    given = models.inputs(tiny, [models.prompt(4, 5), models.prompt(6, 3)], models.pixels(2))
    mine = type("Mine", (Method,), defined)()
    with torch.inference_mode():
        with pytest.raises(ValueError, match=message), llava_prune.pruned(tiny, mine, check=check):
            tiny(**given)
        tiny(**given)


@pytest.mark.parametrize(
    ("defined", "message"),
    [
        ({"positions": "renumbered"}, "positions='renumbered': must be 'keep' or 'renumber'"),
        ({"vision_positions": "cache"}, "vision_positions='cache': must be 'keep' or 'renumber' or None"),
        ({"decode": "orig"}, "decode='orig': must be 'original' or 'cache'"),
        ({"requires": frozenset({"class-token"})}, "requires=.*: must be a frozenset of class token, patch"),
        ({"requires": "class token"}, "requires='class token': must be a frozenset"),
    ],
)
def test_attributes(defined: dict[str, Any], message: str, tiny: Any) -> None:
    refused(tiny, message, **defined)


@pytest.mark.parametrize("given", [5, [3], slice(-1, None), slice(40, 46), slice(0, 45, 2), torch.zeros(1)])
def test_query_positions(given: Any, tiny: Any) -> None:
    message = r"Mine\(\): queries\(0\) is .*; must be a slice with start and stop from 0 to 45"
    refused(tiny, message, queries=lambda self, layer, spans: given)


def test_query_positions_outside_the_prompt(tiny: Any) -> None:
    refused(tiny, r"queries\(0\) is tensor", True, queries=lambda self, layer, spans: torch.tensor([3, -1]))


@pytest.mark.parametrize("given", [[2], {2: 0}, {2: []}, {2: [37]}, {2: [-2]}])
def test_query_positions_of_the_tower(given: Any, tiny: Any) -> None:
    hooks = {"vision_queries": lambda self, layer: given, "prune_vision": lambda self, view: None}
    refused(tiny, "must be block -> list of query positions from 0 to 36", **hooks)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (torch.arange(45), "returned Tensor; must be a Cut"),
        (Cut(torch.arange(45)), r"a Cut with index \(45,\) torch.int64; must be a Cut with index \(2, L'\) long"),
        (Cut(torch.arange(45)[None]), r"a Cut with index \(1, 45\)"),
        (Cut(torch.arange(45.0).expand(2, -1)), "torch.float32; must be"),
    ],
)
def test_cuts(cut: Any, message: str, tiny: Any) -> None:
    refused(tiny, message, prune=lambda self, layer, view: cut if layer == 1 else None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda view: view.features, r"prune_vision\(\) returned Tensor; must be a VisionCut or None"),
        (lambda view: VisionCut(FEW[:, :9], view.features[:, :9]), "ids None; .* without ids give 36 tokens"),
        (lambda view: VisionCut(FEW.float(), view.features), r"live is \(2, 36\) torch.float32"),
        (lambda view: VisionCut(FEW[:1], view.features[:1]), r"live is \(1, 36\) .* must be \(2, K\) bool"),
        (lambda view: VisionCut(FEW, view.features[..., :9], FEW.long()), r"features \(2, 36, 9\)"),
        (lambda view: VisionCut(FEW, view.features, FEW[:, :9].long()), r"ids \(2, 9\) torch.int64"),
        (lambda view: VisionCut(FEW, view.features, FEW.float()), "ids .* torch.float32"),
    ],
)
def test_vision_cuts(make: Any, message: str, tiny: Any) -> None:
    refused(tiny, message, prune_vision=lambda self, view: make(view))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"counts": [20, 12]}, r"counts are \[20, 12\], and live has \[12, 12\]"),
        ({"ids": FEW.long() * 36}, "ids name patch 36; there are 36"),
    ],
)
def test_values_of_vision_cuts(more: dict[str, Any], message: str, tiny: Any) -> None:
    refused(tiny, message, True, prune_vision=lambda self, view: VisionCut(FEW, view.features, **more))
