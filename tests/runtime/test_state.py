"""The state of requests, settings that hold for a block, and image sizes across threads."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.runtime import sizes as sizes_module
from llava_prune.runtime import state
from tests import models

ROW = models.prompt(4, 5)
WIDE = (200, 60)


def test_sizes_hold_for_the_block_only() -> None:
    with llava_prune.image_sizes([(3, 4)]):
        assert state.hints().image_sizes == [(3, 4)]
        with llava_prune.image_sizes(None):
            assert state.hints().image_sizes is None and state.hints().sizes_given
        assert state.hints().image_sizes == [(3, 4)]
    assert state.hints() == state.Hints() and not sizes_module._OPEN
    with pytest.raises(KeyError), llava_prune.image_sizes([(3, 4)]):
        raise KeyError
    assert state.hints() == state.Hints() and not sizes_module._OPEN


@pytest.mark.parametrize("sizes", [[640, 480], (640, 480), [(640,)], [(640, 480, 3)], ["ab"], [None], 5, [[1, 2], 3]])
def test_flat_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"give one \(width, height\)"), llava_prune.image_sizes(sizes):
        pass


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_sizes_must_be_positive(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"), llava_prune.image_sizes([size]):
        pass


def asked(model: Any, n: int, sizes: Any) -> list[Any]:
    """Return the kept tokens of a prompt with n images under `image_sizes`, or with the package's own argument."""
    given = models.inputs(model, [models.prompt(4, 5, images=n)], models.pixels(n))
    with llava_prune.pruned(model, "autoprune", tokens=9) as handle:
        if models.is_llava(model):
            models.generate(model, {**given, "image_sizes": sizes}, 2)
        else:
            with llava_prune.image_sizes(sizes):
                models.generate(model, given, 2)
        return [k.tolist() for k in handle.last.kept]


def test_sizes_must_fit_the_images(tiny: Any) -> None:
    """Too few sizes, too many, and the two numbers of a single size are refused."""
    assert asked(tiny, 2, [WIDE, (60, 200)]) != asked(tiny, 2, [(60, 200), WIDE])
    for n, sizes in ((2, [WIDE]), (1, [WIDE, WIDE]), (3, [WIDE, WIDE])):
        with pytest.raises(ValueError, match=f"{len(sizes)} image sizes for {n} images"):
            asked(tiny, n, sizes)
    with pytest.raises(ValueError, match=r"give one \(width, height\)"):
        asked(tiny, 2, list(WIDE))


@pytest.mark.parametrize("method", ["uniform", "visionzip"])
def test_sizes_are_checked_for_every_method(tiny_models: dict[str, Any], method: str) -> None:
    model = tiny_models["hf"]
    given = models.inputs(model, [ROW], models.pixels(1))
    with llava_prune.pruned(model, method, tokens=9), llava_prune.image_sizes([WIDE, WIDE]):
        for call in (lambda: models.generate(model, given), lambda: model(**given)):
            with pytest.raises(ValueError, match="2 image sizes for 1 images"):
                call()


def test_sizes_with_beams(tiny_models: dict[str, Any]) -> None:
    """Each image has its size although beams may encode every image several times."""
    model = tiny_models["hf"]
    rows = [ROW, models.prompt(7, 3, seed=1)]
    given = models.inputs(model, rows, models.pixels(2))
    with llava_prune.pruned(model, "autoprune", tokens=9) as handle, llava_prune.image_sizes([WIDE, (60, 200)]):
        models.generate(model, given, 2)
        kept = [k.tolist() for k in handle.last.kept]
        models.generate(model, given, 2, num_beams=3)
        step = handle.last.kept[0].shape[0] // 2
        assert [k[::step].tolist() for k in handle.last.kept] == kept


class Thread(threading.Thread):
    """A thread that keeps what its target returned or raised."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.call, self.result, self.error = target, None, None

    def run(self) -> None:
        try:
            self.result = self.call()
        except Exception as error:
            self.error = error


def in_thread(call: Any) -> Thread:
    thread = Thread(call)
    thread.start()
    thread.join()
    return thread


def test_threads_started_inside_the_block(tiny_models: dict[str, Any]) -> None:
    """A thread started inside the block, as for a TextIteratorStreamer, needs a copy of the context for the sizes."""
    model = tiny_models["hf"]
    given = models.inputs(model, [ROW], models.pixels(1))
    with llava_prune.pruned(model, "autoprune", tokens=9) as handle:

        def kept() -> list[Any]:
            models.generate(model, given, 2)
            return [k.tolist() for k in handle.last.kept]

        bare = in_thread(kept).result
        with llava_prune.image_sizes([WIDE]):
            expected = kept()
            lost = in_thread(kept)
            assert isinstance(lost.error, ValueError) and "copy_context().run" in str(lost.error)
            context = contextvars.copy_context()
            assert in_thread(lambda: context.run(kept)).result == expected

            def own() -> list[Any]:
                with llava_prune.image_sizes(None):
                    return kept()

            assert in_thread(own).result == bare
        assert in_thread(kept).result == bare and expected != bare


@pytest.mark.parametrize("method", ["fastervlm", "uniform", "fastv"])
def test_threads_of_methods_that_know_no_padding(tiny_models: dict[str, Any], method: str) -> None:
    """Methods that do not use padding ignore the sizes of another thread."""
    model = tiny_models["hf"]
    given = models.inputs(model, [ROW], models.pixels(1))
    with llava_prune.pruned(model, method, tokens=16), llava_prune.image_sizes([WIDE]):
        assert in_thread(lambda: models.generate(model, given, 2)).error is None


def test_anyres_threads_do_not_mix(logits: Any) -> None:
    """Package llava's splice gives patch numbers to one thread while other threads use it for features."""
    model = models.tiny_llava(anyres=True)
    sizes = [(200, 90), (60, 160), (84, 84)]
    givens = [models.inputs(model, [ROW], [models.crops(s, seed=i)], [s]) for i, s in enumerate(sizes)]
    with llava_prune.pruned(model, "visionzip", tokens=30):
        expected = [logits(model, g) for g in givens]
        wrong: list[str] = []
        gate = threading.Barrier(3)

        def work(i: int) -> None:
            gate.wait()
            for _ in range(10):
                if not torch.allclose(logits(model, givens[i]), expected[i], atol=1e-4):
                    wrong.append(f"request {i}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_padding_side_and_threads(tiny_models: dict[str, Any]) -> None:
    """Loaded.generate pads on the left and restores the config when the last of several calls ends."""
    model = tiny_models["llava"]
    model.config.tokenizer_padding_side = "right"
    loaded = models.loaded(model)
    rows, pixels = [ROW, models.prompt(9, 2, seed=1)], models.pixels(2)
    try:
        expected = loaded.generate(rows, pixels, max_new_tokens=3).tolist()
        wrong: list[Any] = []
        gate = threading.Barrier(3)

        def work() -> None:
            gate.wait()
            for _ in range(8):
                out = loaded.generate(rows, pixels, max_new_tokens=3).tolist()
                if out != expected:
                    wrong.append(out)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and model.config.tokenizer_padding_side == "right"
    finally:
        model.config.tokenizer_padding_side = "left"


def test_prompts_beyond_the_context(tiny_models: dict[str, Any]) -> None:
    """Package llava would cut off the question after four images; it is kept, and both families answer alike."""
    rows, pixels = [models.prompt(4, 9, images=4)], models.pixels(4)
    answers = []
    for family in ("llava", "hf"):
        model = tiny_models[family]
        loaded = models.loaded(model)
        before = model.config.tokenizer_model_max_length if family == "llava" else None
        if family == "llava":
            model.config.tokenizer_model_max_length = 100
            with pytest.warns(UserWarning, match="longer than the model's context of 100"):
                answers.append(loaded.generate(rows, pixels, max_new_tokens=3).tolist())
            assert model.config.tokenizer_model_max_length == 100
            given = models.inputs(model, rows, pixels)
            with llava_prune.pruned(model, "uniform", tokens=9), pytest.warns(UserWarning, match="cuts off"):
                models.generate(model, given, 2)
            model.config.tokenizer_model_max_length = before
        else:
            answers.append(loaded.generate(rows, pixels, max_new_tokens=3).tolist())
    assert answers[0] == answers[1]
