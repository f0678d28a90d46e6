"""Replayed decoding steps equal ordinary ones up to rounding, and caches stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.experimental import steps
from tests import models
from tests.contract.settings import setting
from tests.experimental.tape import Recorder, asked, same

CLOSE = 2e-5
ROWS = [models.prompt(4, 5), models.prompt(9, 2, seed=1)]


def answers(model: Any, rows: Any, new: int = 5, seed: int = 0, **options: Any) -> Any:
    return models.generate(model, models.inputs(model, rows, models.pixels(len(rows), seed=seed)), new, **options)


def alike(a: Any, b: Any) -> None:
    """Check that ids are equal, and logits and caches equal up to rounding."""
    assert a.sequences.tolist() == b.sequences.tolist()
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), rtol=0, atol=CLOSE)
    for old, new in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
        torch.testing.assert_close(new.keys, old.keys, rtol=0, atol=CLOSE)
        torch.testing.assert_close(new.values, old.values, rtol=0, atol=CLOSE)


def in_turn(model: Any, texts: Sequence[int], rounds: int) -> None:
    """Check that prompts with these numbers of text tokens, several times in turn, are answered as without graphs."""
    rows = [[models.prompt(4, n)] for n in texts]
    with llava_prune.pruned(model, "fastv", tokens=16):
        expected = [answers(model, row) for row in rows]
    with llava_prune.pruned(model, "fastv", tokens=16, graphs=True):
        for _ in range(rounds):
            for row, old in zip(rows, expected, strict=True):
                alike(old, answers(model, row))


@pytest.mark.parametrize("count", [1, 2])
def test_tokens_of_every_method(count: int, name: str, hyper: Any, tiny: Any, recorder: Recorder) -> None:
    """Single prompts, and pairs of prompts of different lengths with padding before and after the cuts."""
    with llava_prune.pruned(tiny, name, **hyper):
        expected = [answers(tiny, ROWS[:count], seed=s) for s in range(3)]
    with llava_prune.pruned(tiny, name, graphs=True, **hyper):
        got = [answers(tiny, ROWS[:count], seed=s) for s in range(3)]
    assert recorder.steps > 0 and recorder.stepped > 2 * 3
    for a, b in zip(expected, got, strict=True):
        alike(a, b)  # also the first answers, whose caches have left the buffers


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_long_answers_take_larger_buffers(
    attn: str, tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "ROOM", (3, 9, 40))
    monkeypatch.setattr(steps, "GRAIN", 1)
    model = (models.tiny_llava if models.is_llava(tiny) else models.tiny_hf)(attn=attn, kv_heads=2)
    with llava_prune.pruned(model, "autoprune", tokens=12):
        expected = answers(model, ROWS, 20)
    with llava_prune.pruned(model, "autoprune", tokens=12, graphs=True):
        alike(expected, answers(model, ROWS, 20))
        assert recorder.steps == 3
        alike(expected, answers(model, ROWS, 20))  # the larger buffers have replaced the first two recordings
        recorded = recorder.steps
        alike(expected, answers(model, ROWS, 20))
        assert recorder.steps == recorded == 5


def test_memory_grows_with_the_prompt(tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRAIN", 1)
    in_turn(tiny, (3, 30, 3, 60), 2)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(options: dict[str, int], tiny: Any, recorder: Recorder) -> None:
    """Beam search reorders the cache after every token."""
    with llava_prune.pruned(tiny, "autoprune", tokens=12):
        expected = answers(tiny, ROWS, **options)
    with llava_prune.pruned(tiny, "autoprune", tokens=12, graphs=True):
        got = answers(tiny, ROWS, **options)
    assert recorder.stepped
    assert got.sequences.tolist() == expected.sequences.tolist()


def test_two_conversations_in_turn(tiny: Any, recorder: Recorder) -> None:
    """The buffers hold one request at a time, and each conversation finds its own cache when it continues."""

    def talk() -> torch.Tensor:
        opened = []
        for seed in range(2):
            given = models.inputs(tiny, ROWS[:1], models.pixels(1, seed=seed))
            opened.append(tiny(**given, use_cache=True).past_key_values)
        return torch.stack([step(cache, n) for n in range(6) for cache in opened])

    def step(cache: Any, n: int) -> torch.Tensor:
        return tiny(input_ids=torch.tensor([[5 + n]]), past_key_values=cache, use_cache=True).logits[0, -1]

    with torch.inference_mode(), llava_prune.pruned(tiny, "fastv", tokens=16):
        expected = talk()
    with torch.inference_mode(), llava_prune.pruned(tiny, "fastv", tokens=16, graphs=True):
        got = talk()
    assert recorder.stepped >= 8
    torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE)


def test_a_broken_request_spoils_none_after_it(tiny: Any, recorder: Recorder) -> None:
    """A request with NaN leaves none in the buffers, since masked columns are multiplied too."""
    pixels = models.pixels(1)
    with llava_prune.pruned(tiny, "fastv", tokens=16) as handle:
        expected = asked(tiny, ROWS[0], pixels, handle)
    with llava_prune.pruned(tiny, "fastv", tokens=16, graphs=True) as handle:
        asked(tiny, models.prompt(4, 20), pixels, handle)
        bad = asked(tiny, models.prompt(4, 20), pixels * torch.nan, handle)
        assert bad["logits"].isnan().any() and recorder.stepped
        for _ in range(2):
            same(asked(tiny, ROWS[0], pixels, handle), expected)


def test_cropped_caches_go_on(tiny: Any, recorder: Recorder) -> None:
    """Decoding continues after three tokens are cropped from the cache and another request runs in between."""

    def run() -> torch.Tensor:
        given = models.inputs(tiny, ROWS[:1], models.pixels(1))
        out = tiny(**given, use_cache=True)
        cache, logits = out.past_key_values, []
        for n in (0, 1, 2, 3, 4, 2, 3, 4):
            if n == 2 and len(logits) > 3:
                for layer in cache.layers:
                    layer.crop(-3)
                answers(tiny, ROWS[:1], seed=5)
            token = torch.tensor([[7 + n + len(logits)]])
            out = tiny(input_ids=token, past_key_values=cache, use_cache=True)
            logits.append(out.logits[0, -1])
        return torch.stack(logits)

    with torch.inference_mode(), llava_prune.pruned(tiny, "fastv", tokens=16):
        expected = run()
    with torch.inference_mode(), llava_prune.pruned(tiny, "fastv", tokens=16, graphs=True):
        torch.testing.assert_close(run(), expected, rtol=0, atol=CLOSE)
    assert recorder.stepped >= 6


@pytest.mark.parametrize("why", ["gradient", "several", "flash"])
def test_other_tokens_run_as_ever(why: str, tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "flash":
        monkeypatch.setattr(steps, "BACKENDS", ())
    with llava_prune.pruned(tiny, "vtw", **setting("vtw").hyper, graphs=True):
        for _ in range(3):
            with torch.no_grad():
                cache = tiny(**models.inputs(tiny, ROWS[:1], models.pixels(1)), use_cache=True).past_key_values
            with torch.set_grad_enabled(why == "gradient"):
                for n in range(2):
                    ids = torch.tensor([[3 + n] * (2 if why == "several" else 1)])
                    tiny(input_ids=ids, past_key_values=cache, use_cache=True)
    assert recorder.steps == 0


def test_recordings_are_dropped_at_the_limit(tiny: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LIMIT", 2)
    monkeypatch.setattr(steps, "GRAIN", 1)
    in_turn(tiny, (2, 3, 4), 3)
    assert recorder.steps > 3
