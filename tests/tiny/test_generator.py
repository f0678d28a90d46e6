"""Scenes and questions: determinism, ground truth, disjoint seeds."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from playground.tiny import data as dt
from playground.tiny import questions as qs
from playground.tiny import scenes as sc


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_scene_and_image_are_deterministic(seed):
    first, second = sc.make_scene(seed), sc.make_scene(seed)
    assert first == second
    assert np.array_equal(dt.pixels_of(first), dt.pixels_of(second))
    assert not np.array_equal(dt.pixels_of(first), dt.pixels_of(sc.make_scene(seed + 1)))


def test_things_do_not_touch_and_lie_inside():
    for seed in range(200):
        scene = sc.make_scene(seed)
        assert len(scene.things) >= 2
        assert len({t.name for t in scene.things}) == len(scene.things)
        for i, a in enumerate(scene.things):
            assert a.rx <= a.cx <= scene.width - a.rx and a.ry <= a.cy <= scene.height - a.ry
            for b in scene.things[:i]:
                assert abs(a.cx - b.cx) > a.rx + b.rx or abs(a.cy - b.cy) > a.ry + b.ry


@pytest.mark.parametrize("aspect", list(sc.ASPECTS))
def test_preprocess_pads_to_the_square(aspect):
    scene = sc.make_scene(3, aspect)
    pixels = sc.preprocess(sc.render(scene))
    assert pixels.shape == (sc.SIDE, sc.SIDE, 3)
    ox, oy = scene.offset()
    assert (ox, oy) == {"square": (0, 0), "wide": (0, 21), "tall": (21, 0)}[aspect]
    if ox or oy:
        assert tuple(pixels[0, 0]) == sc.PAD_COLOUR


def test_instance_map_covers_every_thing():
    for seed in range(50):
        scene = sc.make_scene(seed)
        found = set(np.unique(sc.instance_map(scene))) - {0}
        assert found == set(range(1, len(scene.things) + 1))


def test_patchify_matches_a_convolution():
    import torch

    pixels = dt.pixels_of(sc.make_scene(5))
    kernel = torch.randn(4, 3, sc.PATCH, sc.PATCH)
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    want = torch.nn.functional.conv2d(image, kernel, stride=sc.PATCH).flatten(2)[0].T
    got = torch.from_numpy(dt.patchify(pixels).reshape(576, -1)).float() @ kernel.flatten(1).T
    assert torch.allclose(want, got, rtol=1e-4, atol=1e-1)


def test_every_kind_of_question_is_asked_with_the_right_answer():
    seen = set()
    for seed in range(300):
        scene = sc.make_scene(seed)
        names = {t.name for t in scene.things}
        for q in qs.ask(scene, np.random.default_rng(seed), 12):
            seen.add(q.detailed)
            words = q.text.rstrip("?").replace(" in the image", "").split()
            if q.detailed == "exist":
                assert (" ".join(words[-2:]) in names) == (q.answer == "yes")
            if q.detailed == "colorQuery":
                assert [t.colour for t in scene.things if t.shape == words[-1]] == [q.answer]
            if q.detailed == "count":
                key = words[2] if words[2] in sc.COLOURS else None
                total = sum(t.colour == key or (key is None and qs.plural(t.shape) == words[2]) for t in scene.things)
                assert q.answer == str(total)
    assert seen >= (set(qs.GENERATORS) - {"logical", "markQuery"}) | {"existAnd", "existOr", "wordQuery", "numberQuery"}


def test_yes_and_no_are_balanced():
    answers = [
        q.answer
        for seed in range(400)
        for q in qs.ask(sc.make_scene(seed), np.random.default_rng(seed), 10)
        if q.structural in ("verify", "logical")
    ]
    assert 0.46 < answers.count("yes") / len(answers) < 0.54


def test_training_and_held_out_seeds_are_disjoint():
    recipe = yaml.safe_load((Path(sc.__file__).with_name("recipe.yaml")).read_text(encoding="utf-8"))
    assert recipe["scenes"] <= dt.VALIDATION_SEED < dt.HELD_OUT_SEED
