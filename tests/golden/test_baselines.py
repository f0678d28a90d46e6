"""DivPrune, DART, VisPruner, CDPruner, SCOPE, HoloV and HiRED against runs of their official code (float32, CPU).

baselines.npz holds recorded inputs of the official selections and the tokens that they chose. Each selection runs on
them as a function, and through both families on a model whose own tokens are replaced by the recorded ones. DART also
runs end to end on the decoder of llava-tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llava_prune
from llava_prune.methods import cdpruner, dart, divprune, hired, holov, scope, vispruner
from llava_prune.methods.views import ImageLayout
from tests import models
from tests.golden.wide import kept, projector, recorded_tokens, write_wide

BUDGETS = (192, 128, 64)
EVERY = torch.ones(1, 576, dtype=torch.bool)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("baselines.npz")) as file:
        return {k: file[k] for k in file.files}


def tensor(values: np.ndarray) -> Tensor:
    return torch.tensor(values).float()


@pytest.fixture(scope="module", params=["llava", "hf"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_wide(tmp_path_factory.mktemp("wide") / "model")
    return llava_prune.load(folder, family=request.param, dtype="float32", device="cpu").model


@pytest.fixture(scope="module")
def given(wide: Any) -> dict[str, Any]:
    return models.inputs(wide, [models.prompt(5, 7)], torch.zeros(1, 3, 336, 336))


# functions of tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tokens", BUDGETS)
def test_divprune(tokens: int, strict: bool, recorded: Any) -> None:
    x = tensor(recorded["divprune/case0/x_f16"])[None]
    order, distance = divprune.max_min(x, EVERY, tokens, strict)
    assert order[0].tolist() == recorded[f"divprune/case0/order_b{tokens}"].tolist()
    np.testing.assert_allclose(distance[0, :64], recorded["divprune/case0/score_b64"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("tokens", BUDGETS)
def test_dart(tokens: int, recorded: Any) -> None:
    states, keys = (tensor(recorded[f"dart/case0/{name}_f16"])[None] for name in ("state", "keys"))
    start, place = int(recorded["dart/case0/start"]), torch.arange(states.shape[1])[None]
    visual, text = (place >= start) & (place < start + 576), place >= start + 576
    found, there = dart.pivots(keys.abs().sum((1, 3)), visual, text)
    assert there.all()
    pivots = [recorded[f"dart/case0/pivots_{name}"].tolist() for name in ("image", "text", "in_turn")]
    assert found[0].tolist() == pivots[0] + pivots[1]
    turns = torch.tensor([dart.set_order(found[0].tolist())])
    assert found[0, turns[0]].tolist() == pivots[2]
    for given, name in ((turns, "keep"), (None, "keep_in_found_order")):
        chosen = dart.choose(states, keys, visual, text, [4 + tokens // 8 * 8], given)
        assert (chosen[0].nonzero()[:, 0] - start).tolist() == recorded[f"dart/case0/{name}_b{tokens}"].tolist()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tokens", [192, 64])
def test_vispruner(tokens: int, strict: bool, recorded: Any) -> None:
    score = tensor(recorded[f"vispruner/case0/attn_heads_b{tokens}"]).mean(0)[None]
    features = tensor(recorded["vispruner/case0/features_f16"])[None]
    important, diverse = vispruner.select(features, score, tokens, 0.5, strict)
    assert important[0].tolist() == recorded[f"vispruner/case0/important_b{tokens}"].tolist()
    assert diverse[0].tolist() == recorded[f"vispruner/case0/residual_b{tokens}"].tolist()


@pytest.mark.parametrize("tokens", [128, 64])
def test_vispruner_in_float64(tokens: int, recorded: Any) -> None:
    """Features without noise, on which the official code itself differs between float32 and float64."""
    score = torch.tensor(recorded["vispruner/case1_f64/attn_heads"]).double().mean(0)[None]
    features = torch.tensor(recorded["vispruner/case1_f64/features_f16"]).double()[None]
    important, diverse = vispruner.select(features, score, tokens, 0.5)
    assert important[0].tolist() == recorded[f"vispruner/case1_f64/important_b{tokens}"].tolist()
    assert diverse[0].tolist() == recorded[f"vispruner/case1_f64/residual_b{tokens}"].tolist()


@pytest.mark.parametrize(
    ("name", "count", "hyper"),
    [
        ("order_192", 192, {}),
        ("alpha_half", 64, {"alpha": 0.5}),
        ("alpha_two", 64, {"alpha": 2.0}),
        ("add", 64, {"combine": "add"}),
    ],
)
def test_scope(name: str, count: int, hyper: Any, recorded: Any) -> None:
    features, attention = (tensor(recorded[f"scope/case1/{k}"])[None] for k in ("features", "attention"))
    assert scope.cover(features, attention, count, **hyper)[0].tolist() == recorded[f"scope/case1/{name}"].tolist()


@pytest.mark.parametrize("strict", [False, True])
def test_cdpruner_with_clip(strict: bool, recorded: Any) -> None:
    tokens, images = (tensor(recorded[f"cdpruner/case1/{name}"])[None] for name in ("proj", "image_embeds"))
    text = tensor(recorded["cdpruner/case1/text_embeds"])
    kernel = cdpruner.clip_kernel(tokens, cdpruner.clip_relevance(images, text, strict=strict), strict)
    order, gain = cdpruner.greedy(kernel, EVERY, 192, strict=strict)
    assert order[0].tolist() == recorded["cdpruner/case1/order_192"].tolist()
    np.testing.assert_allclose(gain[0], recorded["cdpruner/case1/gain_192"], atol=1e-6, rtol=0)
    diagonal = kernel.diagonal(dim1=1, dim2=2)[0]
    np.testing.assert_allclose(diagonal, recorded["cdpruner/case1/diagonal"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "count", "regions"), [("64", 64, 16), ("192", 192, 16), ("128_p8", 128, 8), ("192_p5", 192, 5)]
)
@pytest.mark.parametrize("alpha", [0.0, 0.09, 10.0])
def test_holov(name: str, count: int, regions: int, alpha: float, recorded: Any) -> None:
    """The weight of the variance has no effect; no region is too small, so both forms choose the same tokens."""
    features, attention = (tensor(recorded[f"holov/case1/{k}"])[None] for k in ("features", "attention"))
    want = recorded[f"holov/case1/keep_{name}"].tolist()
    for strict in (True, False):
        order, total = holov.select(features, attention, EVERY, [count], [regions], alpha, strict)
        assert order[0, :count].tolist() == want and total.item() == count


@pytest.mark.parametrize(("name", "count", "regions"), [("64", 64, 16), ("128_p8", 128, 8), ("288", 288, 16)])
def test_holov_with_regions_that_are_too_small(name: str, count: int, regions: int, recorded: Any) -> None:
    """The official code fills up with zeros, the package with the next tokens of other regions."""
    features, attention = (tensor(recorded[f"holov/case2/{k}"])[None] for k in ("features", "attention"))
    want = recorded[f"holov/case2/keep_{name}"].tolist()
    order, total = holov.select(features, attention, EVERY, [count], [regions], strict=True)
    assert order[0, : len(want)].tolist() == want and total.item() == len(want) < count
    order, total = holov.select(features, attention, EVERY, [count], [regions])
    assert total.item() == count and set(want) < set(order[0, :count].tolist())


HIRED = {"640": (640, 0.5), "160": (160, 0.5), "r20_a25": (576, 0.25), "r40_a75": (1152, 0.75)}


@pytest.mark.parametrize("name", HIRED)
def test_hired_on_crops(name: str, recorded: Any) -> None:
    budget, alpha = HIRED[name]
    first, last = (tensor(recorded[f"hired/case1/{k}"])[..., 1:].sum(1) for k in ("first", "last"))
    layout = ImageLayout(5, 2, 2, (600, 600))
    want = np.unpackbits(recorded[f"hired/case1/mask_{name}"])[: 5 * 576].reshape(5, 576)
    tiles = hired.tile_of_patch(layout, (24, 24), strict=True)
    assert (
        hired.select(first[0], last, budget, alpha, tiles, strict=True).numpy().tolist() == want.astype(bool).tolist()
    )
    ours = hired.select(first[0], last, budget, alpha, hired.tile_of_patch(layout, (24, 24)))
    assert ours.sum() == budget and ours[0].tolist() == want[0].astype(bool).tolist()


# through a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("order", ["raster", "selection"])
def test_divprune_through_a_model(order: str, strict: bool, wide: Any, given: Any, recorded: Any) -> None:
    want = recorded["divprune/case0/order_b64"].tolist()
    with recorded_tokens(wide, projected=tensor(recorded["divprune/case0/x_f16"])):
        found = kept(wide, "divprune", {"tokens": 64, "order": order, "strict": strict}, given)
    assert found == (sorted(want) if order == "raster" else want)


def test_vispruner_through_a_model(wide: Any, given: Any, recorded: Any) -> None:
    features = tensor(recorded["vispruner/case0/features_f16"])
    with recorded_tokens(wide, features, attention=tensor(recorded["vispruner/case0/attn_heads_b64"])):
        for strict in (False, True):
            found = kept(wide, "vispruner", {"tokens": 64, "strict": strict}, given)
            assert found == recorded["vispruner/case0/keep_b64"].tolist()


@pytest.mark.parametrize("tokens", BUDGETS)
def test_scope_through_a_model(tokens: int, wide: Any, given: Any, recorded: Any) -> None:
    features, attention = (tensor(recorded[f"scope/case1/{k}"]) for k in ("features", "attention"))
    with recorded_tokens(wide, features, attention=attention[None]):
        for strict in (False, True):
            found = kept(wide, "scope", {"tokens": tokens, "strict": strict}, given)
            assert found == sorted(recorded["scope/case1/order_192"][:tokens].tolist())


@pytest.mark.parametrize("tokens", BUDGETS)
def test_hired_through_a_model(tokens: int, wide: Any, given: Any, recorded: Any) -> None:
    with recorded_tokens(wide, attention=tensor(recorded["hired/case1/last"])[0]):
        assert kept(wide, "hired", {"tokens": tokens}, given) == recorded[f"hired/case1/keep15_{tokens}"].tolist()
        assert kept(wide, "fastervlm", {"tokens": tokens}, given) == recorded[f"hired/case1/keep15_{tokens}"].tolist()


@pytest.mark.parametrize(("case", "tokens"), [("case1", 64), ("case1", 192), ("case2", 288)])
def test_holov_through_a_model(case: str, tokens: int, wide: Any, given: Any, recorded: Any) -> None:
    """Tokens of zeros do not stand for a patch and come last."""
    features, attention = (tensor(recorded[f"holov/{case}/{k}"]) for k in ("features", "attention"))
    want = recorded[f"holov/{case}/keep_{tokens}"].tolist()
    with recorded_tokens(wide, projected=features, attention=attention[None]):
        found = kept(wide, "holov", {"tokens": tokens, "regions": 16, "strict": True}, given)
        ours = kept(wide, "holov", {"tokens": tokens, "regions": 16}, given)
    assert found == want + [-1] * (tokens - len(want))
    assert ours == sorted(ours) and len(ours) == tokens and set(want) <= set(ours)


@pytest.fixture
def spoken(wide: Any, recorded: Any) -> Iterator[dict[str, Any]]:
    """A prompt whose text is embedded as the recorded instruction."""
    rows = tensor(recorded["cdpruner/case1/text_rows"])
    table = models.language_model(wide).embed_tokens.weight
    before = table.detach().clone()
    ids = list(range(3, 3 + len(rows)))
    with torch.no_grad():
        table[ids] = rows
        yield models.inputs(wide, [[*ids[:4], models.IMAGE, *ids[4:]]], torch.zeros(1, 3, 336, 336))
        table.copy_(before)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("genai_keep", {}),
        ("genai_w1_keep", {"weight": 1.0}),
        ("genai_split_keep", {"halves": True}),
        ("contrib_keep", {"variant": "contrib"}),
    ],
)
@pytest.mark.parametrize("tokens", BUDGETS)
def test_cdpruner_through_a_model(
    name: str, hyper: Any, tokens: int, wide: Any, spoken: dict[str, Any], recorded: Any
) -> None:
    with recorded_tokens(wide, projected=tensor(recorded["cdpruner/case1/proj"])):
        for strict in (False, True):
            found = kept(wide, "cdpruner", {"tokens": tokens, "strict": strict, **hyper}, spoken)
            assert found == recorded[f"cdpruner/case1/{name}_{tokens}"].tolist()


@pytest.fixture(scope="module", params=["llava", "hf"])
def trained(request: pytest.FixtureRequest, root: Path) -> Any:
    folder = root / "playground/models/llava-tiny"
    model = llava_prune.load(folder, family=request.param, dtype="float32", device="cpu").model
    model.generation_config.eos_token_id = None  # the recorded answers do not stop
    return model


@pytest.mark.parametrize("tokens", [128, 64])
def test_dart_end_to_end(tokens: int, trained: Any, recorded: Any) -> None:
    """Kept tokens, lengths, positions and five greedy steps; the recorded embeddings take the place of the prompt's."""
    run = {name: recorded[f"dart/case1_e2e/{name}_b{tokens}"] for name in ("keep", "decode_logits", "decode_positions")}
    embeds = tensor(recorded["dart/case1_e2e/inputs_embeds_f16"])
    start, lm = int(recorded["dart/case1_e2e/start"]), models.language_model(trained)
    text = torch.cat([embeds[:start], embeds[start + 576 :]])
    ids = torch.cdist(text, lm.embed_tokens.weight.detach()).argmin(1)
    assert torch.allclose(lm.embed_tokens.weight[ids], text, atol=2e-3)
    before = lm.embed_tokens.weight.detach().clone()
    row = [*ids[:start].tolist(), models.IMAGE, *ids[start:].tolist()]
    seen: list[list[int]] = []
    table = torch.cat(lm.rotary_emb(torch.zeros(1), torch.arange(640)[None]), 2)[0]  # (P, 2 dh)

    def positions(module: Any, args: Any, kwargs: Any) -> None:
        rope = torch.cat([x.float() for x in kwargs["position_embeddings"]], 2)[0]
        seen.append(torch.cdist(rope, table).argmin(1).tolist())

    image = embeds[None, start : start + 576]
    hooks = [
        projector(trained).register_forward_hook(lambda module, args, output: image.to(output)),
        lm.layers[-1].register_forward_pre_hook(positions, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            lm.embed_tokens.weight[ids] = text
        with llava_prune.pruned(trained, "dart", keep=tokens, strict=True, check=True) as handle:
            out = models.generate(trained, models.inputs(trained, [row], torch.zeros(1, 3, 168, 168)), 5)
    finally:
        with torch.no_grad():
            lm.embed_tokens.weight.copy_(before)
        for hook in hooks:
            hook.remove()
    assert handle.last is not None and handle.last.kept[-1].tolist() == [run["keep"].tolist()]
    lengths = recorded[f"dart/case1_e2e/seq_len_per_layer_b{tokens}"].tolist()
    assert models.cache_lengths(out.past_key_values) == [n + 4 for n in lengths]
    assert seen[0] == recorded[f"dart/case1_e2e/positions_last_layer_b{tokens}"].tolist()
    assert [p[-1] for p in seen] == run["decode_positions"][:, 1].tolist()
    np.testing.assert_allclose(torch.stack(out.logits)[:, 0], run["decode_logits"], atol=3e-5, rtol=0)
