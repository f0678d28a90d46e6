"""Names, presets and hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import llava_prune

pytestmark = pytest.mark.usefixtures("clean_registry")


def one() -> type:
    @llava_prune.register("mine", presets={"small": {"tokens": 3}})
    @dataclass(frozen=True)
    class Mine(llava_prune.Method):
        tokens: int
        seed: int = 0

    return Mine


def test_names_are_sorted_and_know_the_package() -> None:
    names = llava_prune.names()
    assert names == sorted(names)
    assert {"full", "autoprune", "autoprune-flash", "random", "uniform"} <= set(names)
    cls = one()
    assert "mine" in llava_prune.names() and cls.name == "mine"
    assert "mine:small" in llava_prune.names(presets=True)
    assert "mine:small" not in llava_prune.names()


def test_presets_and_their_overriding() -> None:
    one()
    assert llava_prune.build("mine:small").hyper() == {"tokens": 3, "seed": 0}
    assert llava_prune.build("mine:small", tokens=5, seed=2).hyper() == {"tokens": 5, "seed": 2}
    assert llava_prune.build("mine:small") is not llava_prune.build("mine:small")


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        (5, {}, "5 is not the name of a method; give a text"),
        (None, {}, "None is not the name of a method"),
        ("nobody", {}, "unknown method 'nobody'; known are autoprune"),
        ("mine:large", {}, "no preset 'large'"),
        ("full:any", {}, "it has none"),
        ("mine", {"tokens": 1, "colour": 2}, "no hyper-parameter colour; it has tokens, seed"),
        ("mine", {}, "needs tokens"),
    ],
)
def test_build_refuses(name: Any, hyper: dict[str, int], message: str) -> None:
    one()
    with pytest.raises(ValueError, match=message):
        llava_prune.build(name, **hyper)


def test_a_name_is_given_once() -> None:
    first = one()
    assert llava_prune.register("mine")(first) is first  # the same class again, as a reload does

    class Other(llava_prune.Method):
        pass

    with pytest.raises(ValueError, match="'mine' is taken by .*Mine"):
        llava_prune.register("mine")(Other)
    with pytest.raises(ValueError, match="'full' is taken"):
        llava_prune.register("full")(Other)


@pytest.mark.parametrize("thing", [int, 3, lambda: None])
def test_only_methods_register(thing: object) -> None:
    with pytest.raises(ValueError, match="is not a subclass"):
        llava_prune.register("odd")(thing)  # type: ignore[arg-type]
    assert "odd" not in llava_prune.names()


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("autoprune", {"lam": -0.1}),
        ("autoprune", {"k0": float("nan")}),
        ("autoprune", {"gamma": float("inf")}),
        ("autoprune", {"x0": "14.9"}),
        ("autoprune", {"mi_scale": -1}),
        ("autoprune", {"budget": "mean"}),
        ("autoprune", {"tokens": 0}),
        ("autoprune-flash", {"flash_score": "sum"}),
        ("random", {"tokens": -1}),
        ("random", {"seed": 1.5}),
        ("random", {"seed": "a"}),
        ("uniform", {"tokens": 2.0}),
        ("autoprune", {"strict": "no"}),
        ("autoprune", {"mask_padding": "yes"}),
        ("autoprune", {"mask_padding": None}),
    ],
)
def test_values_are_checked_and_named(name: str, hyper: dict[str, object]) -> None:
    ((key, value),) = hyper.items()
    with pytest.raises(ValueError, match=f"{key}={value!r}".replace(".", r"\.")):
        llava_prune.build(name, **hyper)
