"""Each form of the tower encodes an image once, regardless of the methods and threads that ask for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import llava_prune
from tests import models


def test_cached_images_answer_alike(tiny: Any) -> None:
    """Methods that do not change the tower share the encoded images; a tower that merges encodes its own."""
    loaded = models.loaded(tiny)
    rows, pixels = [models.prompt(5, 7), models.prompt(4, 9, seed=1)], models.pixels(2)
    names = ["full", "visionzip", "prumerge", "tome", "fastervlm"]
    methods = [llava_prune.build(n, **({} if n == "full" else {"tokens": 12})) for n in names]
    alone = []
    for method in methods:
        with llava_prune.pruned(tiny, method):
            alone.append(loaded.generate(rows, pixels, max_new_tokens=4))
    with loaded.remember_images(methods) as cache:
        for _ in range(2):
            for method, want in zip(methods, alone, strict=True):
                with llava_prune.pruned(tiny, method):
                    got = loaded.generate(rows, pixels, keys=["a", "b"], max_new_tokens=4)
                assert torch.equal(got, want), method.name
        assert cache.passes == 4
        with llava_prune.pruned(tiny, "tome", tokens=15):
            loaded.generate(rows, pixels, keys=["a", "b"], max_new_tokens=1)
        assert cache.passes == 6, "another schedule makes another tower"


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "autoprune", "tome"])
def test_threads_share_a_cache(name: str, tiny: Any) -> None:
    """Many threads encode different images at the same time; each image keeps its own attention."""
    loaded = models.loaded(tiny)
    count, rows = 12, [models.prompt(5, 7)]
    pixels = models.pixels(count)
    method = llava_prune.build(name, tokens=12)
    with llava_prune.pruned(tiny, method):
        alone = [loaded.generate(rows, pixels[i : i + 1], max_new_tokens=3).tolist() for i in range(count)]
        kept: dict[tuple[int, int], Any] = {}
        with loaded.remember_images([method]) as cache:
            gate = threading.Barrier(4)

            def work(k: int) -> None:
                gate.wait()
                for i in range(k, count, 4):
                    kept[0, i] = loaded.generate(rows, pixels[i : i + 1], keys=[i], max_new_tokens=3).tolist()

            threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for i in range(count):  # from the cache
                kept[1, i] = loaded.generate(rows, pixels[i : i + 1], keys=[i], max_new_tokens=3).tolist()
            assert cache.passes == count and cache.hits == count
    assert [kept[0, i] for i in range(count)] == alone
    assert [kept[1, i] for i in range(count)] == alone


@pytest.mark.parametrize("name", ["visionzip", "tome", "autoprune"])
def test_the_user_encodes_inside_the_block(name: str, tiny: Any) -> None:
    """Images that the user encodes get true features, and later requests keep their own cached images."""
    loaded = models.loaded(tiny)
    rows, pixels = [models.prompt(5, 7)], models.pixels(2)

    def encoded() -> torch.Tensor:
        with torch.no_grad():
            if models.is_llava(tiny):
                return tiny.encode_images(pixels)
            return torch.stack(list(tiny.get_image_features(pixel_values=pixels).pooler_output))

    base = encoded()
    with llava_prune.pruned(tiny, name, tokens=12) as handle:
        want = loaded.generate(rows, pixels[:1], max_new_tokens=3)
        with loaded.remember_images([handle.method]):
            for _ in range(2):
                assert torch.equal(encoded(), base)
                assert torch.equal(loaded.generate(rows, pixels[:1], keys=["a"], max_new_tokens=3), want)


def test_a_full_cache_goes_on(tiny: Any) -> None:
    loaded = models.loaded(tiny)
    rows, pixels = [models.prompt(5, 7)], models.pixels(1)
    with llava_prune.pruned(tiny, "visionzip", tokens=12) as handle:
        want = loaded.generate(rows, pixels, max_new_tokens=3)
        with loaded.remember_images([handle.method], limit=0) as cache:
            for _ in range(2):
                assert torch.equal(loaded.generate(rows, pixels, keys=["a"], max_new_tokens=3), want)
            assert cache.size == 0 and cache.passes == 2 and not cache.table


class Calls:
    """A logits processor that calls the model with another image after every token."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given, self.seen = model, given, []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.model(**self.given, use_cache=True).logits[:, -1])
        return scores


@pytest.mark.parametrize("name", ["full", "visionzip", "autoprune"])
def test_calls_inside_a_request_are_not_that_image(name: str, tiny: Any, logits: Any) -> None:
    """Keys, sizes and prompts given for a request do not apply to calls inside it."""
    loaded = models.loaded(tiny)
    row, pixels = models.prompt(5, 7), models.pixels(1)
    other = models.inputs(tiny, [models.prompt(5, 7, seed=3)], models.pixels(1, seed=4))
    hyper = {} if name == "full" else {"tokens": 12}
    with llava_prune.pruned(tiny, name, **hyper) as handle:
        expected, alone = loaded.generate([row], pixels, sizes=[(200, 60)], max_new_tokens=3), logits(tiny, other)
        with loaded.remember_images([handle.method]):
            for _ in range(2):
                inside = Calls(tiny, other)
                said = {"sizes": [(200, 60)], "keys": ["a"], "logits_processor": [inside]}
                assert torch.equal(loaded.generate([row], pixels, max_new_tokens=3, **said), expected)
                assert len(inside.seen) == 3
                assert all(torch.allclose(seen, alone, atol=1e-5) for seen in inside.seen)


@pytest.mark.parametrize("name", ["autoprune", "visionzip", "prumerge+"])
def test_methods_that_were_not_named(name: str, tiny: Any) -> None:
    """The cache records the attention that its methods read; another method is told to be named."""
    loaded, pixels = models.loaded(tiny), models.pixels(1)
    message = r"reads the attention of block \d .*, which was not recorded; .*remember_images\(\[method\]\)"
    with loaded.remember_images(), llava_prune.pruned(tiny, name, tokens=12), pytest.raises(ValueError, match=message):
        loaded.generate([models.prompt(5, 7)], pixels, keys=["a"], max_new_tokens=1)


def test_other_query_positions_than_those_of_the_named_methods(tiny: Any) -> None:
    """The attention of the class token is not taken for the mean attention that a patch receives."""
    loaded, pixels = models.loaded(tiny), models.pixels(1)
    with (
        loaded.remember_images([llava_prune.build("fastervlm", tokens=12)]),
        llava_prune.pruned(tiny, "fastervlm", tokens=12, class_token="received"),
        pytest.raises(ValueError, match=r"attention of block 2 .*, which was not recorded"),
    ):
        loaded.generate([models.prompt(5, 7)], pixels, keys=["a"], max_new_tokens=1)
