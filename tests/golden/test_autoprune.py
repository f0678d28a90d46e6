"""AutoPrune end to end against the official code's own runs (float32, CPU, its random term set to 0).

autoprune.npz holds three prompts at several budgets: tokens of every layer, kept indices, mutual information, slope,
scale and the logits of five greedy steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_prune
from llava_prune.methods.autoprune import schedule
from tests import models
from tests.golden.reference import LAYERS, Case, first_case

CASES = [f"case{c}_b{b}" for c in (0, 1, 2) for b in (192, 128, 64)] + ["case1_alt_b288"]
MASKED = ["case2_mask_b64", "case2_mask_b128"]
SIZE = (640, 427)
"""Width and height of the image of the padding mask."""
PROBE = [0.023154044523835182, -0.004471644293516874, -0.030095607042312622]
"""One weight of layers 0, 15 and 31."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("autoprune.npz")) as file:
        return {k: file[k] for k in file.files}


@pytest.fixture(scope="module")
def cases(recorded: dict[str, np.ndarray]) -> Callable[[str], Case]:
    made = {i: first_case(i, recorded[f"case{i}/input_ids"].tolist()) for i in range(3)}
    return lambda name: made[int(name[4])]


def run(loaded: Any, case: Case, tokens: int, **hyper: Any) -> tuple[Any, torch.Tensor, list[int]]:
    """Return the record, (5, V) logits of the greedy steps and cache lengths after the prefill."""
    given = models.inputs(loaded.model, [case.ids], case.pixels)
    with llava_prune.pruned(loaded.model, "autoprune", tokens=tokens, **hyper) as handle:
        out = models.generate(loaded.model, given, 5)
    lengths = [n - 4 for n in models.cache_lengths(out.past_key_values)]
    return handle.last, torch.stack(out.logits)[:, 0].cpu(), lengths


def compare(name: str, recorded: dict[str, np.ndarray], last: Any, logits: torch.Tensor, lengths: list[int]) -> None:
    """Compare counts and indices exactly, floats with the tolerances that the vectors allow."""

    def want(key: str) -> np.ndarray:
        return recorded[f"{name}/{key}"]

    assert last.tokens_in.tolist() == [want("n_in").tolist()]
    assert last.tokens_out.tolist() == [want("n_out").tolist()]
    assert len(last.kept) == LAYERS
    for layer, (kept, row) in enumerate(zip(last.kept, want("orig_out"), strict=True)):
        assert kept.tolist() == [row[row != -2].tolist()], f"layer {layer}"
    assert lengths == want("kv_len_prefill").tolist()
    for key, stat in (("mi0_norm", "mi0"), ("mi1", "mi1"), ("dynamic_k", "slope"), ("scale", "scale")):
        assert last.stats[stat] == [pytest.approx(float(want(key)), abs=1e-5)], stat
    np.testing.assert_allclose(logits.numpy(), want("gen_logits"), atol=2e-5, rtol=0)


def budget(name: str) -> int:
    return int(name.rsplit("_b", 1)[1])


@pytest.mark.parametrize("name", CASES)
def test_recorded_runs(name: str, reference: Any, recorded: Any, cases: Any) -> None:
    compare(name, recorded, *run(reference, cases(name), budget(name)))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("form", ["square array", "flat tensor", "sizes"])
def test_padding_mask(name: str, form: str, reference: Any, recorded: Any, cases: Any) -> None:
    """The mask is given as an array or computed from the size of the image."""
    mask = recorded[f"{name}/pad_mask"]
    hyper = {
        "square array": {"mask_padding": mask},
        "flat tensor": {"mask_padding": torch.from_numpy(mask).flatten()[None]},
        "sizes": {},
    }[form]
    with llava_prune.image_sizes([SIZE]) if form == "sizes" else nullcontext():
        compare(name, recorded, *run(reference, cases(name), budget(name), **hyper))


def test_mask_is_off_when_asked(reference: Any, recorded: Any, cases: Any) -> None:
    with llava_prune.image_sizes([SIZE]):
        compare("case2_b64", recorded, *run(reference, cases("case2_b64"), 64, mask_padding=False))


def test_sizes_reach_llava_as_its_own_argument(reference: Any, recorded: Any, cases: Any) -> None:
    case = cases("case2")
    with llava_prune.pruned(reference.model, "autoprune", tokens=64) as handle:
        reference.generate([case.ids], case.pixels, sizes=[SIZE], max_new_tokens=1)
        last = handle.last
    expected = recorded["case2_mask_b64/orig_out"][-1]
    assert last.kept[-1].tolist() == [expected[expected != -2].tolist()]


def test_defaults_are_the_official_hyper_parameters(reference: Any, recorded: Any, cases: Any) -> None:
    """The official hyper-parameters, given explicitly in the forms that users write, change nothing."""
    hyper = {"x0": 14.9, "k0": 0.4, "gamma": 0.2, "lam": 0.3, "mi_scale": 1, "budget": "after", "strict": True}
    compare("case0_b64", recorded, *run(reference, cases("case0"), 64, **hyper))


@pytest.mark.parametrize(
    ("hyper", "slope"),
    [({"k0": 1.2, "gamma": 0.1}, "1.2 - 0.1 mi"), ({"x0": 8, "k0": 0.8, "gamma": 0.1}, "0.8 - 0.1 mi")],
)
def test_other_hyper_parameters(hyper: dict[str, Any], slope: str, reference: Any, recorded: Any, cases: Any) -> None:
    """Slope, budget and curve follow the arguments; layer 0 does not depend on them."""
    last, _, lengths = run(reference, cases("case1"), 128, **hyper)
    k = hyper["k0"] - hyper["gamma"] * float(recorded["case1_b128/mi1"])
    assert last.stats["slope"] == [pytest.approx(k, abs=1e-5)]
    assert last.kept[0].tolist() == [recorded["case1_b128/orig_out"][0][:320].tolist()]
    plan = schedule(last.stats["slope"][0], 128, 576, LAYERS, hyper.get("x0", 14.9))
    assert last.tokens_out.tolist() == [list(plan.leaving)]
    assert last.tokens_out.float().mean().item() == pytest.approx(128, abs=1)
    assert lengths == [n + len(cases("case1").ids) - 1 for n in plan.entering(576)]


def test_model_is_the_recorded_one(reference: Any, recorded: Any) -> None:
    """The weights come from a seeded stream; this test fails if a torch release draws other numbers."""
    lm = models.language_model(reference.model)
    probe = [lm.layers[i].mlp.down_proj.weight.flatten()[7].item() for i in (0, 15, 31)]
    assert probe == pytest.approx(PROBE, abs=1e-7)
