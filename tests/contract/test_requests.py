"""Batches, images, beams, later turns and threads: each sample is answered as if it were alone."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import llava_prune
from tests import models
from tests.contract.settings import Setting

ROWS = [models.prompt(4, 5), models.prompt(9, 2, seed=1), models.prompt(2, 12, seed=2)]
CLOSE = 2e-4
"""Batched and single matrix products differ by rounding."""


def alone(model: Any, row: Any, pixels: Any, steps: int = 3) -> tuple[torch.Tensor, Any]:
    """Return (steps, V) logits of a greedy answer, and the output."""
    out = models.generate(model, models.inputs(model, [row], pixels), steps)
    return torch.stack(out.logits)[:, 0], out


def kept_alike(batch: Any, single: Any, b: int) -> None:
    """Check that sample b of a record equals the record of the sample's own run."""
    assert batch.tokens_in[b].tolist() == single.tokens_in[0].tolist()
    assert batch.tokens_out[b].tolist() == single.tokens_out[0].tolist()
    for layer, (a, s) in enumerate(zip(batch.kept, single.kept, strict=True)):
        row = a[b]
        assert row[row != -2].tolist() == s[0].tolist(), f"layer {layer}"
    for key, values in single.stats.items():
        assert batch.stats[key][b] == pytest.approx(values[0], abs=1e-4)


def test_batch_equals_single_runs(name: str, hyper: Any, tiny: Any) -> None:
    pixels = models.pixels(3)
    with llava_prune.pruned(tiny, name, check=True, **hyper) as handle:
        out = models.generate(tiny, models.inputs(tiny, ROWS, pixels), 3)
        batch = handle.last
        for b, row in enumerate(ROWS):
            expected, _ = alone(tiny, row, pixels[b : b + 1])
            kept_alike(batch, handle.last, b)
            got = torch.stack(out.logits)[:, b]
            assert torch.allclose(got[0], expected[0], atol=CLOSE)
            if torch.equal(got.argmax(1), expected.argmax(1)):
                assert torch.allclose(got, expected, atol=CLOSE)


def test_padding_on_the_right(name: str, hyper: Any, tiny: Any) -> None:
    """Padding on the right, as package llava pads for training; only prefills are compared."""
    pixels = models.pixels(3)
    side = getattr(tiny.config, "tokenizer_padding_side", None)
    if side is not None:
        tiny.config.tokenizer_padding_side = "right"
    try:
        with llava_prune.pruned(tiny, name, **hyper) as handle, torch.inference_mode():
            tiny(**models.inputs(tiny, ROWS, pixels, side="right"))
            batch = handle.last
            for b, row in enumerate(ROWS):
                tiny(**models.inputs(tiny, [row], pixels[b : b + 1]))
                kept_alike(batch, handle.last, b)
    finally:
        if side is not None:
            tiny.config.tokenizer_padding_side = side


def test_samples_with_and_without_images(name: str, hyper: Any, tiny: Any) -> None:
    rows = [ROWS[0], [1, 7, 9, 11, 13], ROWS[2]]
    pixels = models.pixels(2)
    given = models.inputs(tiny, rows, pixels)
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        out = models.generate(tiny, given, 2)
        batch = handle.last
        assert batch.tokens_in[1].tolist() == batch.tokens_out[1].tolist() == [0] * models.LAYERS
        for b, p in ((0, pixels[:1]), (2, pixels[1:])):
            expected, _ = alone(tiny, rows[b], p, 1)
            kept_alike(batch, handle.last, b)
            assert torch.allclose(out.logits[0][b], expected[0], atol=CLOSE)
    base = models.generate(tiny, models.inputs(tiny, [rows[1]]), 1)
    assert torch.allclose(out.logits[0][1], base.logits[0][0], atol=CLOSE)


def test_several_images(name: str, chosen: Setting, tiny: Any) -> None:
    """The visual tokens of all images form one list in sequence order; the text after the last image is the query."""
    rows = [models.prompt(3, 6, images=2), ROWS[0]]
    pixels = models.pixels(3)
    with llava_prune.pruned(tiny, name, check=True, **chosen.hyper) as handle:
        out = models.generate(tiny, models.inputs(tiny, rows, pixels), 2)
        batch = handle.last
        for b, p in ((0, pixels[:2]), (1, pixels[2:])):
            expected, _ = alone(tiny, rows[b], p, 1)
            kept_alike(batch, handle.last, b)
            assert torch.allclose(out.logits[0][b], expected[0], atol=CLOSE)
    if not chosen.prunes:
        assert batch.tokens_in[:, 0].tolist() == [2 * models.PATCHES, models.PATCHES]
    assert (batch.kept[0][0] < 2 * models.PATCHES).all()


def test_no_text_after_the_image(name: str, hyper: Any, tiny: Any) -> None:
    rows = [models.prompt(4, 0), ROWS[0], models.prompt(1, 0, seed=3)]
    pixels = models.pixels(3)
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        out = models.generate(tiny, models.inputs(tiny, rows, pixels), 2)
        batch = handle.last
        assert all(step.isfinite().all() for step in out.logits)
        assert all(v == v for values in batch.stats.values() for v in values)
        for b, row in enumerate(rows):
            expected, _ = alone(tiny, row, pixels[b : b + 1], 1)
            kept_alike(batch, handle.last, b)
            assert torch.allclose(out.logits[0][b], expected[0], atol=CLOSE)


def test_beams(name: str, hyper: Any, tiny: Any) -> None:
    pixels = models.pixels(2)
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        out = models.generate(tiny, models.inputs(tiny, ROWS[:2], pixels), 4, num_beams=3, output_scores=True)
        assert handle.last.tokens_out.shape[0] in (2, 6)
        lengths = models.cache_lengths(out.past_key_values)
        for b, row in enumerate(ROWS[:2]):
            single = models.generate(
                tiny, models.inputs(tiny, [row], pixels[b : b + 1]), 4, num_beams=3, output_scores=True
            )
            assert single.sequences.tolist() == [out.sequences[b].tolist()]
            assert torch.allclose(single.sequences_scores, out.sequences_scores[b : b + 1], atol=1e-3)
        greedy = models.generate(tiny, models.inputs(tiny, ROWS[:2], pixels), 4)
        assert models.cache_lengths(greedy.past_key_values) == lengths


def test_sampling_follows_the_seed(name: str, hyper: Any, tiny: Any) -> None:
    given = models.inputs(tiny, ROWS[:2], models.pixels(2))
    with llava_prune.pruned(tiny, name, **hyper):
        answers = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            answers.append(models.generate(tiny, given, 8, do_sample=True, temperature=2.0).sequences)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_later_turn(name: str, hyper: Any, tiny: Any) -> None:
    """New text on the cache gives the same logits at once and token by token; a new image is refused with advice."""
    pixels, new = models.pixels(1), torch.tensor([[17, 23, 42]])
    with llava_prune.pruned(tiny, name, **hyper), torch.inference_mode():
        given = models.inputs(tiny, ROWS[:1], pixels)
        cache = tiny(**given, use_cache=True).past_key_values
        length = len(ROWS[0]) - 1 + models.PATCHES
        steps, copied = [], copy.deepcopy(cache)
        for i in range(3):
            mask = torch.ones(1, length + i + 1, dtype=torch.long)
            out = tiny(input_ids=new[:, i : i + 1], attention_mask=mask, past_key_values=copied, use_cache=True)
            steps.append(out.logits[:, -1])
        mask = torch.ones(1, length + 3, dtype=torch.long)
        block = tiny(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        assert torch.allclose(block, torch.stack(steps, 1), atol=CLOSE)
        assert models.cache_lengths(cache) == models.cache_lengths(copied)
        with pytest.raises(ValueError, match="start a new cache"):
            tiny(**given, past_key_values=cache, use_cache=True)


def test_threads_do_not_mix(name: str, hyper: Any, tiny: Any, logits: Any) -> None:
    """Several threads use one attached model at the same time, with prompts of different lengths."""
    givens = [models.inputs(tiny, [row], models.pixels(1, seed=i)) for i, row in enumerate(ROWS)]
    givens.append(models.inputs(tiny, [[1, 5, 6, 7]]))
    with llava_prune.pruned(tiny, name, **hyper):
        expected = [logits(tiny, g) for g in givens]
        wrong: list[str] = []
        gate = threading.Barrier(len(givens))

        def work(i: int) -> None:
            gate.wait()
            for _ in range(3):
                try:
                    if not torch.allclose(logits(tiny, givens[i]), expected[i], atol=CLOSE):
                        wrong.append(f"request {i} was answered differently")
                except Exception as error:  # the assertion below shows it
                    wrong.append(f"request {i}: {error!r}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(givens))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert wrong == []


def test_half_precision(name: str, hyper: Any) -> None:
    model = models.tiny_hf().to(torch.bfloat16)
    given = models.inputs(model, ROWS, models.pixels(3).to(torch.bfloat16))
    with llava_prune.pruned(model, name, **hyper) as handle:
        out = models.generate(model, given, 2)
        assert all(step.isfinite().all() for step in out.logits)
        assert handle.last.tokens_in.shape == (3, models.LAYERS)


def test_double_precision_and_autocast(name: str, hyper: Any) -> None:
    """Every method runs in float64, with the choice of float32, and under autocast, which mixes two dtypes."""
    model, double = models.tiny_hf(), models.tiny_hf().double()
    given, wide = (models.inputs(m, ROWS, models.pixels(3).to(m.dtype)) for m in (model, double))
    with llava_prune.pruned(double, name, **hyper):
        expected = models.generate(double, wide, 2).logits
    with llava_prune.pruned(model, name, **hyper) as handle:
        assert torch.allclose(models.generate(model, given, 2).logits[0], expected[0].float(), atol=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = models.generate(model, given, 2)
        assert all(step.isfinite().all() for step in out.logits)
        assert handle.last.tokens_in.shape == (3, models.LAYERS)


def test_forward_without_position_ids(name: str, hyper: Any, tiny: Any) -> None:
    """forward() counts the positions of padding, and a prompt after it is pruned as it is alone."""
    pixels = models.pixels(3)
    with llava_prune.pruned(tiny, name, **hyper) as handle, torch.inference_mode():
        logits = tiny(**models.inputs(tiny, ROWS, pixels)).logits
        batch = handle.last
        for b, row in enumerate(ROWS):
            expected = tiny(**models.inputs(tiny, [row], pixels[b : b + 1])).logits
            kept_alike(batch, handle.last, b)
            assert torch.allclose(logits[b, -1], expected[0, -1], atol=CLOSE)
