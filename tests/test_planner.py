"""The planner of runs from methods, presets, budgets and hyper-parameters, as eval, bench and the tables use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import llava_prune
from llava_prune.bench import speed
from llava_prune.bench.flops import Size
from llava_prune.bench.methods import table
from llava_prune.eval import plan as evaluation
from llava_prune.methods.planner import Run, cases, check_budgets, check_schedules, expand, plan

NAMES = ("fastv", "fastv:paper", "fastv:192", "pdrop:128", "visionzip:32+fastv:keep64", "fastervlm:192+vtw", "random")
LABELS = [
    ("fastv-64", 64), ("fastv-8", 8), ("fastv-paper", None), ("fastv-192-192", 192), ("pdrop-128-128", 128),
    ("visionzip-32+fastv-keep64", None), ("fastervlm-192+vtw-64", 64), ("fastervlm-192+vtw-8", 8),
    ("random-64", 64), ("random-8", 8),
]  # fmt: skip


def labels(runs: list[Any]) -> list[tuple[str, int | None]]:
    return [(r.label, r.tokens) for r in runs]


def test_labels_and_budgets() -> None:
    """A preset with a budget runs with that budget alone; a preset that fixes the counts runs without one."""
    runs = plan(cases(NAMES, (64, 8, 64)))
    assert labels(runs) == LABELS
    for run in runs:
        assert isinstance(run, Run) and run.method.name == llava_prune.build(run.name).name
        if run.tokens is not None:
            assert run.method.hyper()["tokens"] == run.tokens
    assert runs[3].method == llava_prune.build("fastv", tokens=192)
    assert runs[2].method == llava_prune.build("fastv:paper")


def test_eval_and_bench_plan_alike() -> None:
    """eval and bench plan the same labels, budgets and hyper-parameters from the same settings."""
    shared: dict[str, Any] = {"methods": NAMES, "tokens": (64, 8), "method_args": {"seed": 3}}
    one = evaluation.plan_runs(evaluation.Settings(model="a/b", reference=False, **shared))
    two = speed.plan_runs(speed.Settings(**shared))
    assert labels(one) == labels(two) == LABELS
    assert [repr(r.method) for r in one] == [repr(r.method) for r in two]


def test_the_table_of_methods_plans_alike() -> None:
    rows = table([64, 8], Size(), 70, NAMES)
    assert [(r.name, r.tokens) for r in rows] == [(c.name, c.tokens) for c in cases(NAMES, (64, 8))]


def test_order_reference_and_all() -> None:
    assert [r.label for r in plan(cases(["random", "full", "random"], (8,)))] == ["random-8", "full"]
    assert [r.label for r in plan(cases(["random", "full"], (8,), reference=True))] == ["full", "random-8"]
    assert expand(["fastv:paper", "all"], reference=True)[:2] == ["full", "fastv:paper"]
    assert sorted({*expand(["all"])}) == llava_prune.names()


def test_hyper_parameters() -> None:
    """Arguments of the call override defaults, which override presets; each applies to the methods that have it."""
    stated = {"autoprune": {"k0": 0.1, "mi_scale": 8.0}, "fastv": {"layer": 1}}
    runs = plan(cases(["autoprune", "fastv:k3-64", "random"], (8,), {"k0": 0.2}, defaults=stated, seed=5))
    assert runs[0].method.hyper()["k0"] == 0.2 and runs[0].method.hyper()["mi_scale"] == 8.0
    assert runs[1].label == "fastv-k3-64-64" and runs[1].method.hyper()["layer"] == 1
    assert runs[2].method.hyper()["seed"] == 5
    assert plan(cases(["random"], (8,), {"seed": 7}, seed=5))[0].method.hyper()["seed"] == 7
    assert plan(cases(["random"], (8,)))[0].method.hyper()["seed"] == 0
    inside = plan(cases(["visionzip+autoprune"], (8,), defaults=stated))[0].method.hyper()
    assert inside["k0"] == 0.1 and inside["vision_tokens"] == 20


def test_hyper_parameters_that_fix_the_counts() -> None:
    """A method whose hyper-parameters fix the counts runs without a budget, the others with each budget."""
    runs = plan(cases(["fastv", "random"], (64, 8), {"keep": 100}))
    assert labels(runs) == [("fastv", None), ("random-64", 64), ("random-8", 8)]
    assert runs[0].method.hyper()["keep"] == 100 and runs[0].method.hyper()["tokens"] is None


@pytest.mark.parametrize(
    ("names", "budgets", "args", "message"),
    [
        (["nosuch"], (8,), {}, "unknown method 'nosuch'; known are autoprune, "),
        (["fastv:nosuch"], (8,), {}, "no preset 'nosuch'; it has .*paper"),
        (["fastv", "full"], (8,), {"nosuch": 1}, "none of fastv, full has a hyper-parameter nosuch; known are keep"),
        (["full"], (8,), {"k0": 1}, "has a hyper-parameter k0; known are none"),
        (["autoprune"], (8,), {"k0": -1}, "k0=-1: must be"),
        (["autoprune"], (8,), {"tokens": 5}, "METHOD_ARGS tokens=5.*use TOKENS"),
        ([], (8,), {}, "no method given; choose from autoprune, "),
        (["autoprune"], (), {}, "no budget given; TOKENS is"),
    ],
)  # fmt: skip
def test_refused(names: list[str], budgets: tuple[int, ...], args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan(cases(names, budgets, args))
    assert "\n" not in str(caught.value)


def test_equal_labels_are_refused(clean_registry: None) -> None:
    """Two runs with the same label would share a folder of results."""

    @llava_prune.register("fastv-paper")
    @dataclass(frozen=True)
    class Other(llava_prune.Method):
        """A method whose name is the label of another method's run."""

    assert [r.label for r in plan(cases(["fastv-paper"], (8,)))] == ["fastv-paper"]
    with pytest.raises(ValueError, match="fastv:paper and fastv-paper have the same label, 'fastv-paper'"):
        plan(cases(["fastv:paper", "fastv-paper"], (8,)))


def test_budgets_above_the_visual_tokens() -> None:
    runs = plan(cases(["autoprune", "fastv:paper"], (17,)))
    check_budgets(runs, 17)
    with pytest.raises(ValueError, match="TOKENS=17: .* 16 visual tokens .* give 16 or fewer"):
        check_budgets(runs, 16)


def test_schedules_that_no_model_of_this_depth_allows() -> None:
    runs = plan(cases(["random", "fastv"], (16,)))
    check_schedules(runs, 576, 48)
    with pytest.raises(ValueError, match="^fastv-16: tokens=16: 1 full layer.s. of 12 .* give at least 49"):
        check_schedules(runs, 576, 12)
