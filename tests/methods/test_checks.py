"""Hyper-parameters that a user can type give finite results or are refused in one line."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

import llava_prune
from llava_prune.methods import checks
from llava_prune.methods.autoprune import AutoPrune, schedule
from llava_prune.methods.registry import resolve
from tests import models

HUGE: list[Any] = [1e308, -1e308, 10**400, -(10**400), 10**6000, 1e25, 2**31, 2**64, math.inf, math.nan]
TINY: list[Any] = [5e-324, 1e-9, 1e-6, 0, 0.0, -1]
STRANGE: list[Any] = ["x", "", [], [1], [10**400], ["a"], [[1]], [math.nan], {}, {"a": 1}, True, 0.5, 1, 1e6, [3, 3]]
WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("sparsevlm", "scale"): {"version": "1.0"},
    ("sparsevlm", "bias"): {"version": "1.0", "scale": 1},
    ("sparsevlm", "heads"): {"version": "2.0"},
    ("pdrop", "layers"): {"ratios": [0.5]},
    ("pdrop", "ratios"): {"layers": [2]},
}
"""Other arguments that an argument needs to have an effect."""


@pytest.fixture(scope="module")
def asked() -> tuple[Any, dict[str, Any]]:
    model = models.tiny_hf()
    return model, models.inputs(model, [models.prompt(5, 7)], models.pixels(1))


@pytest.mark.parametrize("name", llava_prune.names())
def test_every_value_works_or_is_refused(name: str, asked: tuple[Any, dict[str, Any]]) -> None:
    model, given = asked
    cls, _ = resolve(name)
    known = inspect.signature(cls).parameters
    used = refused = 0
    for p in known:
        budget = {"tokens": 12} if "tokens" in known and p not in ("tokens", *cls.fixes_budget) else {}
        hyper = WITH.get((name, p), budget)
        for value in (*HUGE, *TINY, *STRANGE):
            try:
                with llava_prune.pruned(model, name, **{**hyper, p: value}) as handle, torch.inference_mode():
                    out = model(**given)
                    record = handle.last
                assert record is not None
                assert torch.isfinite(out.logits).all(), (p, value)
                assert record.tokens_out.max() <= models.PATCHES + 1, (p, value)
                used += 1
            except ValueError as error:
                text = str(error)
                assert type(error) is ValueError and "\n" not in text and len(text) < 300, (p, text)
                assert not any(word in text for word in ("digits", "verflow", "convert")), (p, text)
                refused += 1
    assert name in ("full", "text-only") or (used and refused)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("autoprune", {"lam": 1e308}, r"lam=1e\+308: must be a finite number in \[0, 1e\+06\]"),
        ("autoprune", {"lam": 10**400}, r"lam=1e400: must be a finite number in \[0, 1e\+06\]"),
        ("autoprune", {"slope_step": 5e-324}, r"slope_step=5e-324: must be a finite number in \[1e-09, 1e\+06\]"),
        ("autoprune", {"x0": -0.5}, "x0=-0.5: must be a finite number in"),
        ("autoprune", {"tokens": 1}, "tokens=1: must be an integer of at least 2$"),
        ("autoprune", {"tokens": 10**25}, "tokens=10000000000000000000000000: .* at least 2, at most 2147483647"),
        ("autoprune", {"tokens": np.int64(64)}, r"tokens=np.int64\(64\): must be .* at least 2, as an int of Python$"),
        ("autoprune", {"strict": 1}, "strict=1: must be True or False"),
        ("autoprune", {"mask_padding": [0, 2]}, r"mask_padding=\[0, 2\]: must be True, False or a mask"),
        (
            "random",
            {"seed": 2**64},
            r"seed=18446744073709551616: must be an integer in \[-9223372036854775808, 18446744",
        ),
        ("random", {"seed": 1.5}, "seed=1.5: must be an integer in .*, the range of torch.manual_seed"),
        ("pdrop", {"ratios": 0.5}, r"ratios=0.5: must be a list of numbers, as \[0.5, 0.25\]"),
        ("pdrop", {"layers": 8}, r"layers=8: must be a list of integers, as \[8, 16\]"),
        ("prumerge", {"ratio": 5e-324}, r"ratio=5e-324: must be a finite number in \[1e-06, 1\]"),
        ("topv", {"iterations": 10**9}, "iterations=1000000000: must be a positive integer, at most 1000"),
        ("topv", {"unit": "yes"}, "unit='yes': must be True or False"),
        ("visionzip", {"keep_cls": 0.0}, "keep_cls=0.0: must be True or False"),
    ],
)
def test_limits_are_named(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava_prune.build(name, **hyper)


def test_limits_are_inside() -> None:
    llava_prune.build("autoprune", tokens=2, lam=1e6, slope_step=1e-9, x0=0)
    for seed in checks.SEEDS:
        method: Any = llava_prune.build("random", seed=seed)
        assert method.ranking(9).numel() == 9
    assert llava_prune.build("sparsevlm", version=2.0).hyper()["version"] == "2.0"  # as YAML reads version=2.0


def test_autoprunes_smallest_budget() -> None:
    """The search of the official code ends at 2 tokens for a budget of 1, and at no more for a budget of 2."""
    plan = schedule(0.2, 2, 576, 32, 14.9)
    assert plan.leaving == (5, *[2] * 31)
    for tokens in (0, 1):
        with pytest.raises(ValueError, match=f"tokens={tokens}: the budget must be at least 2"):
            schedule(0.2, tokens, 576, 32, 14.9)
    assert schedule(0.2, 1, 1, 32, 14.9).leaving == (1,) * 32  # the image has no more
    assert (AutoPrune(tokens=2).plan(576, 32), AutoPrune(tokens=2).example(576, 32)[1][-1]) == (None, 2)


def test_values_in_messages_are_short() -> None:
    assert [checks.shown(v) for v in (10**400, -(10**5000), 7, "a\nb")] == ["1e400", "-1e5000", "7", r"'a\nb'"]
    assert checks.shown("x" * 90) == f"'{'x' * 56}..." and checks.shown([10**5000]) == "a list"
