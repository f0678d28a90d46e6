"""Compositions: names, presets of the parts, budgets and refusals. The contract suites run several of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llava_prune
from tests import models


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("visionzip+autoprune", ("visionzip", "autoprune")),
        ("prumerge++fastv", ("prumerge+", "fastv")),
        ("prumerge+fastv", ("prumerge", "fastv")),
        ("visionzip:default+autoprune-flash", ("visionzip", "autoprune-flash")),
        ("prumerge+:adaptive+vtw:192", ("prumerge+", "vtw")),
    ],
)
def test_names(name: str, parts: tuple[str, str]) -> None:
    method: Any = llava_prune.build(name)
    assert (method.vision.name, method.language.name) == parts
    assert method.name == "+".join(parts)


def test_budgets() -> None:
    method: Any = llava_prune.build("visionzip+autoprune", tokens=64)
    assert (method.vision.tokens, method.language.tokens) == (160, 64) == (method.vision_tokens, method.tokens)
    exact: Any = llava_prune.build("visionzip+autoprune", tokens=64, dominant=54, contextual=10, lam=0.5)
    assert (exact.vision.split(), exact.language.lam, exact.vision_tokens) == ((54, 10), 0.5, None)
    free: Any = llava_prune.build("fastervlm+vtw", layer=4, vision_tokens=100)
    assert (free.vision.tokens, free.language.tokens, free.plan(576, 8)) == (100, None, [100] * 4 + [0] * 4)
    own: Any = llava_prune.build("fastervlm+vtw", layer=4)
    assert own.vision.tokens == llava_prune.build("fastervlm").hyper()["tokens"]


def test_presets_of_the_parts() -> None:
    method: Any = llava_prune.build("visionzip:192+fastv:64")
    assert (method.vision.tokens, method.language.tokens, method.vision.split()) == (192, 64, (162, 30))
    other: Any = llava_prune.build("visionzip:192+fastv:64", tokens=32, vision_tokens=128)
    assert (other.vision.tokens, other.language.tokens) == (128, 32)
    one: Any = llava_prune.build("fastervlm+sparsevlm:plus-64")
    assert (one.language.version, one.tokens, one.vision_tokens) == ("2.0", 64, 160)
    assert (one.positions, one.decode) == ("keep", "original"), "of the instance, not of its class"
    none: Any = llava_prune.build("tome:output-192+pdrop:official")
    assert (none.vision.reading, none.vision.tokens, none.language.layers) == ("output", 192, (8, 16, 24))


def test_plan_and_example() -> None:
    method = llava_prune.build("fastervlm+fastv", tokens=64, vision_tokens=128)
    plan = method.plan(576, 32)
    assert plan == llava_prune.build("fastv", tokens=64).plan(128, 32) and plan[0] == 128
    shown = llava_prune.build("fastervlm+autoprune", tokens=64).example(576, 32)
    assert shown is not None and shown[0][0] == 160 and shown[2].startswith("slope")
    assert llava_prune.build("prumerge+autoprune", adaptive=True).example(576, 32) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autoprune+visionzip", "'autoprune' does not work before the language model"),
        ("full+autoprune", "'full' does not work before the language model"),
        ("random+autoprune", "'random' does not work before the language model"),
        ("visionzip+fastervlm", "'fastervlm' does not work in the language model"),
        ("visionzip+full", "'full' does not work in the language model"),
        ("visionzip+topv", "'visionzip' makes tokens that stand for no patch"),
        ("prumerge++topv", "'prumerge.' makes tokens that stand for no patch"),
        ("pool+topv", "'pool' makes tokens that stand for no patch"),
        ("autoprune+divprune", "'autoprune' does not work before the language model"),
        ("visionzip+divprune", "'divprune' does not work in the language model"),
        ("text-only+fastv", "'text-only' does not work before the language model"),
        ("tome+topv", "'tome' makes tokens that stand for no patch"),
        ("nobody+autoprune", "unknown method 'nobody.autoprune'.*join one before the language model"),
        ("fastervlm+fastv+vtw", "unknown method 'fastervlm.fastv.vtw'.*join one before the language model"),
        ("visionzip:odd+autoprune", "'visionzip' has no preset 'odd'"),
        ("visionzip+fastv:0", "'fastv' has no preset '0'"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava_prune.build(name)


def test_a_name_that_both_parts_have_with_other_defaults() -> None:
    for hyper, want in (({}, (False, True)), ({"strict": True}, (True, True)), ({"strict": False}, (False, False))):
        method: Any = llava_prune.build("holov+autoprune", **hyper)
        assert (method.vision.strict, method.language.strict) == want
    method = llava_prune.build("holov+autoprune", vision_strict=True, strict=False)
    assert (method.vision.strict, method.language.strict) == (True, False)
    again: Any = llava_prune.build("holov+autoprune", **method.hyper())
    assert again.vision.strict and not again.language.strict and again.hyper() == method.hyper()


def test_a_changed_tower_cannot_be_read(tiny: Any) -> None:
    with pytest.raises(ValueError, match="changes the tower"):
        llava_prune.attach(tiny, "tome+autoprune", tokens=12, vision_tokens=20)
    with llava_prune.pruned(tiny, "tome+autoprune", tokens=12, vision_tokens=20, reading="output"):
        pass  # the finished features are merged, the tower is as it was
    with pytest.raises(ValueError, match="leave"):
        llava_prune.attach(tiny, "tome", tokens=3)


FIRSTS = ["fastervlm", "visionzip", "prumerge", "prumerge+", "tome", "vispruner", "scope", "hired", "pool", "resize"]
FIRSTS += ["divprune", "cdpruner", "holov"]


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("second", ["autoprune", "dart", "fastv", "vtw", "pdrop", "sparsevlm", "random", "uniform"])
def test_any_first_with_any_second(first: str, second: str, tiny: Any) -> None:
    """The first method leaves about 20 of 36 patches; the second prunes those and no others."""
    if (first, second) == ("tome", "autoprune"):
        pytest.skip("AutoPrune reads the tower that ToMe changes")
    given = models.inputs(tiny, [models.prompt(5, 7), models.prompt(4, 9, seed=1)], models.pixels(2))
    with llava_prune.pruned(tiny, first, tokens=20) as handle, torch.inference_mode():
        tiny(**given)
        alone = handle.last
    with llava_prune.pruned(tiny, f"{first}+{second}", tokens=12, vision_tokens=20, check=True) as handle:
        with torch.inference_mode():
            assert tiny(**given).logits.isfinite().all()
        both = handle.last
    if second in ("random", "uniform"):  # these cut before the first layer
        assert both.tokens_in.tolist() == [[12] * models.LAYERS] * 2
    else:
        assert both.tokens_in[:, 0].tolist() == alone.tokens_in[:, 0].tolist()
        assert (both.tokens_out[:, -1] < alone.tokens_in[:, 0]).all()
    for early, late in zip(alone.kept[0], both.kept[-1], strict=True):
        assert set(late.tolist()) <= {*early.tolist(), -1, -2}


def test_places_reach_topv_through_a_choice_of_patches(tiny: Any) -> None:
    """Tokens keep the grid positions of their patches, so that TopV's grid term changes the choice."""
    given = models.inputs(tiny, [models.prompt(5, 7)], models.pixels(1))
    kept = []
    for beta in (0.0, 50.0):
        hyper = {"tokens": 16, "vision_tokens": 30, "beta": beta, "sigma": 1.0}
        with llava_prune.pruned(tiny, "fastervlm+topv", **hyper) as handle, torch.inference_mode():
            tiny(**given)
        assert handle.last.tokens_in[0, 0] == 30 > handle.last.tokens_in[0, -1]
        kept.append(handle.last.kept[-1].tolist())
    assert kept[0] != kept[1]
