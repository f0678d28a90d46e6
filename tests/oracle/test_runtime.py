"""Rules of the runtime that hold for every method: positions, padding, beams, later turns and dtypes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import llava_prune
from tests.models import (
    VOCAB,
    cache_lengths,
    generate,
    inputs,
    language_model,
    pixels,
    prompt,
    tiny_hf,
    tiny_llava,
)
from tests.oracle.check import batch, check
from tests.oracle.dense import Watch, near, replay, spliced
from tests.oracle.flash import flash, stand_in
from tests.oracle.scripted import SCRIPT, Scripted

FAMILIES = ["llava", "hf"]
RULES = [(p, d) for p in ("keep", "renumber") for d in ("original", "cache")]


@functools.lru_cache(maxsize=8)
def model_of(family: str, attn: str = "sdpa", kv_heads: int = 4) -> Any:
    return (tiny_llava if family == "llava" else tiny_hf)(attn=attn, kv_heads=kv_heads)


@pytest.mark.parametrize("vision", [0, 5])
@pytest.mark.parametrize("positions, decode", RULES)
@pytest.mark.parametrize(
    "family, attn, kind", [("llava", "sdpa", "one"), ("hf", "sdpa", "padded"), ("llava", "eager", "padded")]
)
def test_positions_and_decode_rules(
    family: str, attn: str, kind: str, positions: str, decode: str, vision: int
) -> None:
    model = model_of(family, attn)
    found = check(model, Scripted(SCRIPT, positions, decode, vision), batch(model, kind))
    assert found.columns[0] > found.columns[2] > found.columns[3] > found.columns[4]
    assert any(-1 in layer for layer in found.samples[0].leaving), "nothing was merged"


def test_rules_make_a_difference() -> None:
    """The four combinations give four different answers, so that the tests above can distinguish them."""
    model = model_of("hf")
    given = batch(model, "padded")
    logits = []
    for positions, decode in RULES:
        with llava_prune.pruned(model, Scripted(SCRIPT, positions, decode)):
            logits.append(torch.stack(generate(model, given).logits[1:]))
    for i, one in enumerate(logits):
        for other in logits[i + 1 :]:
            assert float((one - other).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_query_attention(family: str) -> None:
    model = model_of(family, kv_heads=2)
    check(model, Scripted(SCRIPT, "renumber", "cache"), batch(model, "padded"))


def right_padded(model: Any) -> dict[str, Any]:
    rows = [prompt(4, 6), prompt(6, 11, images=2, seed=1), prompt(9, 3, seed=3)]
    return inputs(model, rows, pixels(4), side="right")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions, decode", RULES)
def test_right_padding(family: str, positions: str, decode: str, monkeypatch: Any) -> None:
    """Samples are aligned at the right end before the first cut, so that a forward and later tokens are right."""
    model = model_of(family)
    if family == "llava":
        monkeypatch.setattr(model.config, "tokenizer_padding_side", "right")
    given = right_padded(model)
    valid = spliced(model, given).valid
    assert bool((valid[:, :-1] & ~valid[:, 1:]).any())
    watch = Watch(Scripted(SCRIPT, positions, decode))
    new = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    mask = valid.long()
    with llava_prune.pruned(model, watch.method) as handle, torch.inference_mode():
        out = model(**given, use_cache=True)
        got = [out.logits[:, -1]]
        lengths = cache_lengths(out.past_key_values)
        for step in torch.tensor(new).T:
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            out = model(input_ids=step[:, None], past_key_values=out.past_key_values, attention_mask=mask)
            got.append(out.logits[:, -1])
        counts = handle.last.tokens_out
    found = replay(model, spliced(model, given), watch, new)
    for b, sample in enumerate(found.samples):
        near(torch.stack([g[b] for g in got]), sample.logits, 1e-4, f"logits of sample {b}")
    assert lengths == found.columns
    assert counts.tolist() == [[len(x) for x in s.leaving] for s in found.samples]


def test_a_mask_with_holes() -> None:
    """Masked columns may lie in the text after an image."""
    model = model_of("hf")
    given = batch(model, "padded")
    ids, mask = given["input_ids"], given["attention_mask"]
    text = (ids != VOCAB) & mask.bool()
    after = text.shape[1] - 3
    mask[1, after] = mask[0, after - 1] = 0  # after the image
    assert bool(text[1, after]) and bool(text[0, after - 1])
    check(model, Scripted(SCRIPT, "renumber", "cache"), given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions, decode", RULES)
@pytest.mark.parametrize("first", [True, False])
def test_second_turn(family: str, positions: str, decode: str, first: bool) -> None:
    """A second turn of several tokens on a pruned cache, then single tokens; a shorter turn is padded on the left."""
    model = model_of(family)
    given = batch(model, "padded")
    script = SCRIPT if first else {k: v for k, v in SCRIPT.items() if k >= 0}
    watch = Watch(Scripted(script, positions, decode))
    turn = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17]]
    ids = torch.tensor([[0] * (4 - len(t)) + t for t in turn])
    tail = torch.tensor([[0] * (4 - len(t)) + [1] * len(t) for t in turn])
    last = torch.tensor([[20], [21], [22], [23]])
    prompt_mask = spliced(model, given).valid.long()
    with llava_prune.pruned(model, watch.method), torch.inference_mode():
        out = model(**given, use_cache=True)
        lengths = cache_lengths(out.past_key_values)
        mask = torch.cat([prompt_mask, tail], 1)
        out = model(input_ids=ids, past_key_values=out.past_key_values, attention_mask=mask)
        got = [out.logits]
        mask = torch.cat([mask, mask.new_ones(4, 1)], 1)
        out = model(input_ids=last, past_key_values=out.past_key_values, attention_mask=mask)
        got.append(out.logits)
    new = [t + n for t, n in zip(turn, last.tolist(), strict=True)]
    found = replay(model, spliced(model, given), watch, [n + [0] * (5 - len(n)) for n in new])
    for b, sample in enumerate(found.samples):
        here = torch.cat([got[0][b, tail[b].bool()], got[1][b]])
        near(here, sample.logits[1 : 1 + len(new[b])], 1e-4, f"logits of sample {b}")
    assert lengths == found.columns
    assert cache_lengths(out.past_key_values) == [c + 5 for c in found.columns]


def test_second_turn_by_generate() -> None:
    """generate() continues on the cache of a generate(), with the whole history as transformers expects it.

    (Package llava passes the embeddings of the new tokens alone to generate(), which takes them for the history; there
    a second turn is a forward.)
    """
    model = model_of("hf")
    given = batch(model, "pair")
    watch = Watch(Scripted({1: (0.5, 0), 3: (0.5, 1)}, "renumber", "cache"))
    turn = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with llava_prune.pruned(model, watch.method):
        first = generate(model, given, 3)
        ids = torch.cat([given["input_ids"], first.sequences, turn], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generate(model, {**more, "past_key_values": first.past_key_values}, 3)
    new = torch.cat([first.sequences, turn, second.sequences], 1).tolist()
    found = replay(model, spliced(model, given), watch, [n[:-1] for n in new])
    for b, sample in enumerate(found.samples):
        got = torch.stack([s[b] for s in (*first.logits, *second.logits)])
        near(got, torch.cat([sample.logits[:3], sample.logits[6:]]), 1e-4, f"logits of sample {b}")
    assert cache_lengths(second.past_key_values) == [c + 8 for c in found.columns]


def test_generate_cannot_continue_a_shortened_prompt() -> None:
    """transformers counts ids by the first layer's cache and drops a mask of ones; the message says what to do."""
    model = model_of("hf")
    given = batch(model, "pair")
    with llava_prune.pruned(model, Scripted({-1: (0.5, 0)}, "renumber", "cache")), torch.inference_mode():
        cache = model(**given, use_cache=True).past_key_values
        ids = torch.cat([given["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 10]])], 1)
        with pytest.raises(ValueError, match=r"cannot continue .*start a new (one|cache)"):  # older releases: cache
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", [0, 3])
def test_beams(family: str, vision: int) -> None:
    """The score of the best beam is that of its tokens in the dense model."""
    model = model_of(family)
    rows = [prompt(4, 6), prompt(6, 11, seed=1), prompt(12, 5, images=0, seed=2), prompt(9, 0, seed=3)]
    given = inputs(model, rows, pixels(3))  # transformers 5.14 shuffles several images of a prompt among its beams
    watch = Watch(Scripted(SCRIPT, "keep", "cache", vision, copies=3))
    with llava_prune.pruned(model, watch.method) as handle:
        out = generate(model, given, 4, num_beams=3, output_scores=True)
        counts = handle.last.tokens_out
    assert counts.shape[0] == 12
    for a in watch.asked:  # decisions of a sample's beams are alike; the replay takes one of them
        a.hidden, a.visual, a.valid, a.ids = a.hidden[::3], a.visual[::3], a.valid[::3], a.ids[::3]
        a.attention = None if a.attention is None else a.attention[::3]
        a.next_row = None if a.next_row is None else a.next_row[::3]
        a.answer = a.answer and _third(a.answer)
    if watch.vision is not None and len(watch.vision.live) == 9:  # the images of every beam were encoded
        cut = watch.vision
        watch.vision = dataclasses.replace(cut, live=cut.live[::3], features=cut.features[::3])
    features = None if watch.vision is None else watch.vision.features
    new = out.sequences.tolist()
    found = replay(model, spliced(model, given, features), watch, [n[:-1] for n in new])
    assert cache_lengths(out.past_key_values) == [c + 3 for c in found.columns]
    for b, sample in enumerate(found.samples):
        score = sample.logits.log_softmax(-1).gather(1, torch.tensor(new[b])[:, None]).sum()
        near(out.sequences_scores[b : b + 1] * 4, score[None], 1e-4, f"score of sample {b}")


def _third(cut: Any) -> Any:
    merged = None if cut.merged is None else cut.merged[::3]
    return llava_prune.Cut(cut.index[::3], merged, None if cut.valid is None else cut.valid[::3])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_several_answers(family: str) -> None:
    model = model_of(family)
    given = batch(model, "pair")
    watch = Watch(Scripted(SCRIPT, "renumber", "cache", 3))
    torch.manual_seed(0)
    with llava_prune.pruned(model, watch.method):
        out = generate(model, given, 4, do_sample=True, num_return_sequences=2, temperature=2.0)
    assert len({tuple(s) for s in out.sequences.tolist()}) > 2
    for a in watch.asked:
        assert a.hidden.shape[0] == 4
    single = {k: v.repeat_interleave(2, 0) for k, v in given.items()}
    features = watch.vision.features.repeat_interleave(2, 0) if len(watch.vision.features) == 2 else None
    if features is not None:
        live = watch.vision.live.repeat_interleave(2, 0)
        watch.vision = llava_prune.VisionCut(live, features)
    found = replay(model, spliced(model, single, watch.vision.features), watch, out.sequences[:, :3].tolist())
    for b, sample in enumerate(found.samples):
        near(torch.stack([s[b] for s in out.logits]), sample.logits, 1e-4, f"logits of answer {b}")
    assert cache_lengths(out.past_key_values) == [c + 3 for c in found.columns]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_cache(family: str) -> None:
    """One forward with use_cache=False: attention rows come from freshly projected keys, nothing is cached."""
    model = model_of(family)
    given = batch(model, "padded")
    watch = Watch(Scripted(SCRIPT, "renumber", "cache"))
    with llava_prune.pruned(model, watch.method) as handle, torch.inference_mode():
        out = model(**given, use_cache=False)
        assert handle.last.tokens_out.shape == (4, 6)
    assert out.past_key_values is None
    found = replay(model, spliced(model, given), watch, [[]] * 4)
    for b, sample in enumerate(found.samples):
        near(out.logits[b, -1:], sample.logits, 1e-4, f"logits of sample {b}")


def test_generate_without_cache() -> None:
    """Each step is a prefill of its own with its own cuts; transformers' loop passes the images every time."""
    model = model_of("hf")
    given = batch(model, "pair")
    watch = Watch(Scripted(SCRIPT, "renumber", "cache", 3))
    with llava_prune.pruned(model, watch.method), torch.inference_mode():
        out = model.generate(
            **given,
            max_new_tokens=3,
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    n = given["input_ids"].shape[1]
    starts = [i for i, a in enumerate(watch.asked) if a.layer == -1]
    assert len(starts) == 3
    for step, first in enumerate(starts):
        end = starts[step + 1] if step < 2 else None
        here = Watch(Scripted(SCRIPT, "renumber", "cache", 3))
        here.asked, here.vision = watch.asked[first:end], watch.vision
        ids = out.sequences[:, : n + step]
        whole = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = replay(model, spliced(model, whole, watch.vision.features), here, [[], []])
        for b, sample in enumerate(found.samples):
            near(out.logits[step][b : b + 1], sample.logits, 1e-4, f"step {step}, sample {b}")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    model = (tiny_llava if family == "llava" else tiny_hf)().to(torch.bfloat16)
    given = batch(model, "padded")
    for name in ("images", "pixel_values"):
        if name in given:
            given[name] = given[name].bfloat16()
    found = check(model, Scripted(SCRIPT, "renumber", "cache", 3), given, tol=0.06)
    assert len(set(found.columns)) > 3


def test_all_logits_of_a_forward() -> None:
    """A forward returns the logits of all rows that remain in the last layer, not only the last row's."""
    model = model_of("hf")
    given = batch(model, "one")
    watch = Watch(Scripted(SCRIPT, "renumber", "cache"))
    with llava_prune.pruned(model, watch.method), torch.inference_mode():
        out = model(**given)
    found = replay(model, spliced(model, given), watch, [[]])
    assert out.logits.shape == (1, found.columns[-1], VOCAB)
    assert language_model(model).forward.__qualname__.startswith("LlamaModel"), "detach restores the stock forward"


def test_flash_attention_gets_what_it_can_read(monkeypatch: Any) -> None:
    masks, model = stand_in(monkeypatch), flash(tiny_hf())
    config = language_model(model).config
    for kind in ("one", "padded"):
        masks.clear()
        check(model, Scripted(SCRIPT, "keep", "original"), batch(model, kind))
        assert len(masks) == 6 * 4
        assert any(m is not None for m in masks) == (kind == "padded")
    with llava_prune.pruned(model, "autoprune", tokens=9):
        assert config._attn_implementation == "flash_attention_2"
        assert all(layer.self_attn.config is config for layer in language_model(model).layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_in_a_later_turn_is_refused(family: str) -> None:
    model = model_of(family)
    given = batch(model, "one")
    turn = {k: v for k, v in given.items() if k != "attention_mask"}
    with llava_prune.pruned(model, Scripted({1: (0.5, 0)})), torch.inference_mode():
        cache = model(**given, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="an image after"):
            model(**turn, past_key_values=cache)
        if family == "llava":  # generate() splices the image before it sees the cache
            with pytest.raises(ValueError, match="an image after"):
                more = {"inputs": turn.pop("input_ids"), **turn}
                model.generate(**more, past_key_values=cache, max_new_tokens=2, do_sample=False)
        out = model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)  # text may follow
        assert out.logits.shape[1] == 2


def test_a_failed_prefill_leaves_no_image_behind() -> None:
    """The state of a broken call does not make a later turn on another cache look like an image."""
    model = model_of("hf")
    given = batch(model, "one")
    with llava_prune.pruned(model, Scripted({1: (0.5, 0)})), torch.inference_mode():
        cache = model(**given, use_cache=True).past_key_values
        with pytest.raises(ValueError):
            model(**{**given, "input_ids": given["input_ids"][:, :-20], "attention_mask": None})  # tokens missing
        assert model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache).logits.shape[1] == 2


def test_cropped_caches() -> None:
    """Cropping the same number of later tokens from every layer is allowed; any other crop is refused."""
    model = model_of("hf")
    given = batch(model, "one")
    watch = Watch(Scripted({-1: (0.9, 0), 1: (0.5, 0)}, "renumber", "cache"))
    with llava_prune.pruned(model, watch.method), torch.inference_mode():
        cache = model(**given, use_cache=True).past_key_values
        for token in (5, 6, 7):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-2)
        out = model(input_ids=torch.tensor([[8]]), past_key_values=cache)
        found = replay(model, spliced(model, given), watch, [[5, 8]])
        near(out.logits[0], found.samples[0].logits[-1:], 1e-4, "logits")
        assert cache_lengths(cache) == [c + 2 for c in found.columns]
        cache.layers[0].crop(-1)
        with pytest.raises(ValueError, match="cropped"):
            model(input_ids=torch.tensor([[8]]), past_key_values=cache)
        cache.crop(-3)
        with pytest.raises(ValueError, match="cropped"):
            model(input_ids=torch.tensor([[8]]), past_key_values=cache)


def test_prompt_lookup_is_refused() -> None:
    """Prompt lookup appends guesses to the prompt before the prefill and crops them away afterwards."""
    model = model_of("hf")
    given = batch(model, "one")
    given["input_ids"][0, -6:] = torch.tensor([7, 8, 7, 8, 7, 8])
    with llava_prune.pruned(model, Scripted({1: (0.5, 0)})), pytest.raises(ValueError, match="cropped"):
        generate(model, given, 12, prompt_lookup_num_tokens=2)


def test_samples_cannot_be_picked_from_a_pruned_cache() -> None:
    model = model_of("hf")
    with llava_prune.pruned(model, Scripted({1: (0.5, 0)})), torch.inference_mode():
        cache = model(**batch(model, "pair"), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match="made for 2 samples"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
