"""The tokens that FastV, VTW, PyramidDrop, SparseVLM and TopV choose: worked examples and equivalences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import llava_prune
from llava_prune import Spans, View, VisionView
from llava_prune.methods.sparsevlm import raters, rotary_ones
from llava_prune.methods.topv import grid_distance, transport, unit_range
from llava_prune.methods.vtw import divergence, first_below
from tests.models import inputs, pixels, prompt, tiny_hf


def view(before: int, n_visual: int, after: int, probs: Any = None, next_row: Any = None, layers: int = 4) -> View:
    """Return a view of one sample; `probs` are the (H, L) attention weights of its last row."""
    length = before + n_visual + after
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, before : before + n_visual] = True
    spans = Spans(length, after, torch.ones(1, after, dtype=torch.bool), (n_visual,), layers)
    rows = None if probs is None else torch.tensor(probs)[None, :, None]
    ask = None if next_row is None else lambda rows: torch.tensor(next_row)[None, :, None]
    ids = (visual.cumsum(1) - 1).masked_fill(~visual, -3)
    hidden = torch.zeros(1, length, 2)
    return View(hidden, visual, torch.ones_like(visual), ids, rows, spans, {}, (before + after,), {}, ask)


def test_fastv_takes_the_head_mean_of_the_last_row() -> None:
    row = [0.1] * 4 + [0.02, 0.10, 0.01, 0.10, 0.05, 0.03] + [0.2, 0.09]
    shown = view(4, 6, 2, [row])
    cut = llava_prune.build("fastv", layer=1, keep=3).prune(0, shown)
    assert cut is not None and cut.index.tolist() == [[0, 1, 2, 3, 5, 7, 8, 10, 11]]
    two = view(0, 2, 1, [[0.5, 0.1, 0.4], [0.1, 0.4, 0.5]])
    cut = llava_prune.build("fastv", layer=1, keep=1).prune(0, two)
    assert cut is not None and cut.index.tolist() == [[0, 2]]


def test_pyramiddrop_takes_the_next_layers_row() -> None:
    shown = view(2, 4, 2, next_row=[[0.3, 0.1, 0.05, 0.20, 0.04, 0.10, 0.1, 0.11]])
    cut = llava_prune.build("pdrop", layers=[1], ratios=[0.5]).prune(0, shown)
    assert cut is not None and cut.index.tolist() == [[0, 1, 3, 5, 6, 7]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hf()


@pytest.fixture(scope="module")
def given(model: Any) -> Any:
    return inputs(model, [prompt(5, 7)], pixels(1))


def logits(model: Any, given: Any, method: str, **hyper: Any) -> tuple[torch.Tensor, Any]:
    with torch.inference_mode(), llava_prune.pruned(model, method, **hyper) as handle:
        return model(**given).logits[:, -1], handle.last


def test_pyramiddrop_readings_differ(model: Any, given: Any) -> None:
    stages = {"layers": [2, 4], "ratios": [0.5, 0.25]}
    _, code = logits(model, given, "pdrop", **stages)
    _, paper = logits(model, given, "pdrop", **stages, score="finished")
    assert code.tokens_out.tolist() == paper.tokens_out.tolist() == [[36, 18, 18, 9, 9, 9]]
    assert code.kept[1].tolist() != paper.kept[1].tolist()


def test_pyramiddrop_ranks_with_the_weights_of_the_next_layer(model: Any, given: Any) -> None:
    """FastV, with the weights of the layer that has just run, keeps other tokens from the same row."""
    _, following = logits(model, given, "pdrop", layers=[2], ratios=[0.5])
    _, finished = logits(model, given, "fastv", layer=2, keep=18)
    assert following.tokens_out.tolist() == finished.tokens_out.tolist()
    assert following.kept[1].tolist() != finished.kept[1].tolist()


def test_fastv_dropping_equals_masking(model: Any, given: Any) -> None:
    """Dropping tokens equals masking their columns from layer K on, with original positions."""
    got, record = logits(model, given, "fastv", layer=2, keep=9)
    columns = torch.tensor([i for i in range(36) if i not in record.kept[-1][0].tolist()]) + 5
    length = given["input_ids"].shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    mask[:, columns] = -torch.inf
    mask[columns, columns] = 0.0  # a dropped row must attend to something; no row attends to it

    def masked(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": mask[None, None]}

    hooks = [
        layer.register_forward_pre_hook(masked, with_kwargs=True) for layer in model.model.language_model.layers[2:]
    ]
    try:
        with torch.inference_mode():
            want = model(**given).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_vtw_ends(model: Any, given: Any) -> None:
    """Withdrawal after the last layer equals the unpruned model exactly; before layer 0, a text prompt with a gap."""
    with torch.inference_mode():
        plain = model(**given).logits[:, -1]
        text = given["input_ids"][given["input_ids"] != model.config.image_token_id][None]
        gap = torch.cat([torch.arange(5), torch.arange(41, 48)])[None]
        alone = model(input_ids=text, position_ids=gap).logits[:, -1]
    assert torch.equal(logits(model, given, "vtw", layer=6)[0], plain)
    torch.testing.assert_close(logits(model, given, "vtw", layer=0)[0], alone, atol=1e-5, rtol=1e-5)


def test_vtw_search_rules() -> None:
    full, withdrawn = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert divergence(full, withdrawn).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert divergence(withdrawn, full).item() == pytest.approx(0.5108, abs=1e-4)
    assert first_below([0.02, 0.01, 0.0029, 0.0040], 0.003) == 7
    with pytest.raises(ValueError, match="no layer from 5 on"):
        first_below([0.02, 0.01], 0.003)


def test_sparsevlm_raters() -> None:
    text = torch.tensor([[2.0, 0], [0, 0], [0, 1]])
    hidden = torch.cat([torch.eye(2), text])[None]
    visual = torch.tensor([[True, True, False, False, False]])
    live = torch.ones(1, 3, dtype=torch.bool)
    assert raters(hidden, visual, live).tolist() == [[True, False, True]]
    assert raters(torch.zeros(1, 5, 2), visual, live).tolist() == [[True, True, True]], "no rater: all of the text"
    alone = torch.tensor([[False, True, False]])
    assert raters(hidden, visual, alone).tolist() == alone.tolist()


def test_rotary_ones_are_a_sum_of_cosines() -> None:
    theta = 10000.0 ** (-torch.arange(8) / 8)
    positions = torch.tensor([0.0, 3, 4, 11])
    angle = torch.cat([positions[:, None] * theta] * 2, 1)[None]
    got = rotary_ones(angle.cos(), angle.sin(), torch.tensor([3]))
    want = [2 / 4 * torch.cos((11 - p) * theta).sum().item() for p in positions]
    torch.testing.assert_close(got[0, 0], torch.tensor(want), atol=1e-5, rtol=0)


def test_sparsevlm_plus_lets_some_heads_vote(model: Any, given: Any) -> None:
    hyper = {"version": "2.0", "layers": [1], "retain": [9]}
    kept = [logits(model, given, "sparsevlm", **hyper, heads=h)[1].kept[-1].tolist() for h in (1, 2, 4)]
    assert kept[0] != kept[2]
    assert logits(model, given, "sparsevlm", **hyper)[1].kept[-1].tolist() == kept[1], "14 of 32 are 2 of 4"


def test_sparsevlm_by_rank(model: Any, given: Any) -> None:
    """Version 1.0 keeps scale x rank + bias tokens; 7 text tokens give a rank of 7 at most."""
    _, record = logits(model, given, "sparsevlm", version="1.0", layers=[1, 3], scale=2, bias=1)
    counts = record.kept[1][0].tolist()
    rank = (sum(i >= 0 for i in counts) - 1) / 2
    assert rank == int(rank) and 1 <= rank <= 7
    assert -1 in counts and record.tokens_out[0, 0] == 36 > record.tokens_out[0, 1] >= record.tokens_out[0, 3]


COST = torch.tensor([[[0.0, 1, 1], [1, 0, 1], [0.2, 0.2, 0]]])
LIVE = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("iterations", "sums"),
    [(1, [0.301266, 0.301266, 0.397468]), (3, [0.313019, 0.313019, 0.373962]), (100, [0.332578, 0.332578, 0.334844])],
)
def test_transport_rows_then_columns(iterations: int, sums: list[float]) -> None:
    got = transport(COST, LIVE, 0.1, 1.0, iterations)
    torch.testing.assert_close(got.sum(2), torch.tensor([sums]), atol=1e-6, rtol=0)
    torch.testing.assert_close(got.sum(1), torch.full((1, 3), 1 / 3), atol=1e-6, rtol=0)
    shifted = COST + torch.tensor([0.3, 0.0, 0.7])[None, :, None]
    torch.testing.assert_close(transport(shifted, LIVE, 0.1, 1.0, iterations), got, atol=1e-6, rtol=0)


@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_transport_columns_then_rows_ranks_nothing(iterations: int) -> None:
    """If the row step is last (here: the plan of the transposed cost, transposed), rows sum to their marginal."""
    plan = transport(COST.transpose(1, 2), LIVE, 0.1, 1.0, iterations).transpose(1, 2)
    torch.testing.assert_close(plan.sum(2), torch.full((1, 3), 1 / 3), atol=1e-6, rtol=0)
    assert float((plan - plan.flip(1)).abs().max()) > 0.1, "the plan itself does depend on the cost"


def test_transport_without_row_step_sees_costs_of_sources() -> None:
    centre = torch.tensor([0.1643, 0.4011, 0.1263, 0.8260, 0.6579])
    cost = centre[None, :, None].expand(1, 5, 5)
    got = transport(cost, torch.ones(1, 5, dtype=torch.bool), 0.1, 0.0, 3).sum(2)
    torch.testing.assert_close(got, torch.tensor([[0.3901, 0.0365, 0.5701, 0.0005, 0.0028]]), atol=3e-4, rtol=0)
    padded = torch.nn.functional.pad(cost, (0, 2, 0, 2))
    live = torch.arange(7)[None] < 5
    plan = transport(padded, live, 0.1, 0.0, 3)
    torch.testing.assert_close(plan.sum(2)[:, :5], got)
    assert plan[:, 5:].abs().max() == plan[:, :, 5:].abs().max() == 0


def test_topv_places() -> None:
    topv = llava_prune.build("topv")
    seen = VisionView(torch.zeros(2, 576, 1), {}, {}, (24, 24))
    assert topv.prune_vision(seen) is None
    off = seen.patch_values["off"]
    assert off[0, 0].item() == pytest.approx(16.2635, abs=1e-4)
    scaled = unit_range(off, torch.ones_like(off, dtype=torch.bool))[1]
    assert scaled.max() == scaled[0] == 1
    assert (scaled == 0).nonzero()[:, 0].tolist() == [275, 276, 299, 300]
    assert off[0, 275].item() == pytest.approx(0.7071, abs=1e-4)
    assert seen.patch_values["x"][1, 25] == 1 and seen.patch_values["y"][1, 25] == 1


def test_topv_grid_term() -> None:
    x, crop = torch.tensor([[0.0, 1, 23, 0]]), torch.tensor([[1.0, 1, 1, 2]])
    y = torch.tensor([[0.0, 0, 23, 0]])
    live = torch.ones(1, 4, dtype=torch.bool)
    for sigma, near in ((1, 0.3935), (5, 0.0198), (10, 0.00499)):
        topv = llava_prune.build("topv", alpha=0, gamma=0, sigma=sigma)
        cost = topv.cost(torch.zeros(1, 4, 4), grid_distance(x, y, crop), torch.zeros(1, 4), live)
        assert cost[0, 0, 1].item() == pytest.approx(near, abs=1e-4)
        assert cost[0, 0, 3] == 1, "another crop"
    assert cost[0, 0, 2].item() == pytest.approx(0.99496, abs=1e-5)


def test_topv_recovers_every_rth_of_the_rest(model: Any, given: Any) -> None:
    _, bare = logits(model, given, "topv", rho=0.25)
    _, more = logits(model, given, "topv", rho=0.25, r=4)
    best = set(bare.kept[-1][0].tolist())
    rest = [i for i in range(36) if i not in best]
    assert more.kept[-1][0].tolist() == sorted(best | set(rest[::4]))
    assert more.tokens_in.tolist() == [[36, 36, 16, 16, 16, 16]]
