"""Evaluation under LLaVA-1.6's protocol: images in crops, other conversation templates, both formats."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_prune
from llava_prune.bench import shapes
from llava_prune.cli import main
from llava_prune.eval import run
from llava_prune.eval.plan import Settings
from llava_prune.eval.protocol import protocol_of
from llava_prune.models.files import load_tokenizer

MINI = "playground/data/mini"
QUESTIONS, LABELS = "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"
SHAPE = dataclasses.replace(
    shapes.SHAPES["tiny"], layers=4, vocab=1300, anyres=True, kv_heads=2, language="mistral", intermediate=96
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, str]:
    """Return the folders of a small random llava-v1.6-mistral, with the same weights in both formats."""
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "small", SHAPE)
        for form in ("llava", "hf"):
            folder = tmp_path_factory.mktemp(form) / "llava-v1.6-mistral"
            shapes.make("small", folder, form, root / "playground/models/llava-tiny")  # type: ignore[arg-type]
            out[form] = str(folder)
    load_tokenizer(Path(out["llava"]), original=True).save_pretrained(out["hf"])  # converted ones have a tokenizer.json
    return out


def evaluated(folder: str, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Evaluate a few questions about images of several shapes; return the rows and the result of each run."""
    settings = Settings(
        task="gqa", model=folder, tokens=(160,), data=str(data), out=str(out), max_new_tokens=3, dtype="float32",
        **{"batch": 4, **more},
    )  # fmt: skip
    found = {}
    for result in run.evaluate(settings):
        place = out / result["label"]
        rows = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
        found[result["label"]] = {"rows": rows, "result": result}
    return found


SIZES = [(900, 500), (400, 1000), (700, 700), (1300, 420), (640, 640)]
"""(width, height) of images for which a single resolution is the best.

For smaller images, several resolutions are equally good and each format takes the first in its list. One format reads
the list as (width, height), the other as (height, width).
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Write one question of the miniature GQA about an image of each of SIZES; return the data folder."""
    from PIL import Image

    out, source = tmp_path_factory.mktemp("data") / "gqa", root / MINI / "gqa"
    (out / "data" / "images").mkdir(parents=True)
    rows = {json.loads(line)["image"]: line for line in (source / QUESTIONS).read_text().splitlines()}
    for (name, _), size in zip(rows.items(), SIZES, strict=False):
        Image.open(source / "data" / "images" / name).resize(size).save(out / "data" / "images" / name)
    (out / QUESTIONS).write_text("\n".join(list(rows.values())[: len(SIZES)]) + "\n")
    shutil.copy(source / "data" / LABELS, out / "data" / LABELS)
    return out.parent


def told(found: dict[str, Any]) -> dict[str, Any]:
    """Return the texts and kept tokens of each run, which must not depend on the format or the batch size."""
    return {label: [(r["text"], r["kept"]) for r in run["rows"]] for label, run in found.items()}


def test_both_formats_and_batch_sizes_agree(checkpoints: dict[str, str], data: Path, tmp_path: Path) -> None:
    reference = evaluated(checkpoints["llava"], data, tmp_path / "a")
    assert told(evaluated(checkpoints["llava"], data, tmp_path / "b", batch=1)) == told(reference)
    assert told(evaluated(checkpoints["llava"], data, tmp_path / "c", family="hf")) == told(reference)
    assert told(evaluated(checkpoints["hf"], data, tmp_path / "d")) == told(reference)
    assert told(evaluated(checkpoints["hf"], data, tmp_path / "e", batch=1)) == told(reference)
    full, pruned = reference["full"], reference["autoprune-160"]
    seen = [r["kept"]["unpruned"] for r in full["rows"]]
    assert len(set(seen)) > 1, "all images have the same number of visual tokens"
    assert [r["kept"]["entering"] for r in full["rows"]] == [[n] * SHAPE.layers for n in seen]
    tokens = pruned["result"]["visual_tokens"]
    assert tokens["unpruned"] == 2880 and tokens["seen"] == pytest.approx(sum(seen) / len(seen))
    assert tokens["average_leaving"] == pytest.approx(160, abs=1)
    assert full["result"]["flops"]["visual_only_entering"]["percent_of_full"] == pytest.approx(100)
    assert full["result"]["settings"]["pad"] is False


def test_prompts_and_pixels_are_llavas(checkpoints: dict[str, str], root: Path) -> None:
    mm_utils, conversation = pytest.importorskip("llava.mm_utils"), pytest.importorskip("llava.conversation")
    from PIL import Image

    loaded = llava_prune.load(checkpoints["llava"], dtype="float32")
    protocol = protocol_of(checkpoints["llava"])
    given = conversation.conv_templates["mistral_instruct"].copy()
    given.append_message(given.roles[0], "<image>\nWhat is it?")
    given.append_message(given.roles[1], None)
    want = mm_utils.tokenizer_image_token(given.get_prompt(), loaded.tokenizer, -200)
    assert protocol.token_ids("What is it?", True, loaded) == want
    image = Image.new("RGB", (500, 220), (90, 10, 200))
    expected = mm_utils.process_images([image], loaded.image_processor, loaded.model.config)[0]
    assert torch.equal(protocol.pixels(image, loaded), expected)
    assert loaded.visual_tokens((500, 220)) == len(pruned_tokens(loaded, expected, image.size))


def pruned_tokens(loaded: Any, crops: torch.Tensor, size: tuple[int, int]) -> range:
    """Return the visual tokens that enter the first layer of the unpruned model."""
    with llava_prune.pruned(loaded.model, "full") as handle:
        loaded.generate([[1, 5, -200, 6]], [crops], sizes=[size], max_new_tokens=1)
    return range(int(handle.last.tokens_in[0, 0]))


def test_another_template_is_another_run(checkpoints: dict[str, str], tmp_path: Path, root: Path) -> None:
    """The store distinguishes a run with --conv-mode from one without."""
    argv = ["eval", "gqa", "--model", checkpoints["llava"], "--data", MINI, "--store", str(tmp_path), "--limit", "1"]
    argv += ["--method", "uniform", "--tokens", "640", "--no-reference", "--json"]
    places = []
    for more in ([], ["--conv-mode", "chatml_direct"], []):
        assert main([*argv, *more]) == 0
        places.append(sorted(p.parent.name for p in tmp_path.rglob("result.json")))
    assert len(places[0]) == 1 and len(places[1]) == 2 and places[2] == places[1]
    modes = {json.loads(p.read_text()).get("conv_mode") for p in tmp_path.rglob("settings.json")}
    assert modes == {None, "chatml_direct"}


def test_the_table_of_llava_next(checkpoints: dict[str, str], data: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["table", "next7b", "--model", checkpoints["llava"], "--data", str(data), "--store", str(tmp_path)]
    argv += ["--task", "gqa", "--method", "autoprune", "--tokens", "160", "--limit", "2", "--device", "cpu"]
    assert main([*argv, "--format", "csv"]) == 0
    cells = [line.split(",") for line in capsys.readouterr().out.splitlines() if line.startswith("next7b,Ours,160,GQA")]
    assert len(cells) == 1 and cells[0][5], "the cell of GQA is empty"
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_budgets_of_crops(checkpoints: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    argv = ["eval", "gqa", "--model", checkpoints["llava"], "--data", MINI, "--out", str(tmp_path / "o")]
    assert main([*argv, "--tokens", "2953", "--limit", "1"]) == 1
    assert "TOKENS=2953: an image has 2952 visual tokens in this model" in " ".join(capsys.readouterr().err.split())


def test_the_cache_encodes_each_crop_once(checkpoints: dict[str, str]) -> None:
    for folder in checkpoints.values():
        loaded = llava_prune.load(folder, dtype="float32")
        draw = torch.Generator().manual_seed(0)
        images = [torch.randn(n, 3, 336, 336, generator=draw) for n in (3, 5)]
        sizes, rows = [(600, 200), (700, 690)], [[1, 5, -200, 6, 7], [1, 8, 9, -200, 6]]
        method = llava_prune.build("autoprune", tokens=160)
        with llava_prune.pruned(loaded.model, method):
            plain = loaded.generate(rows, images, sizes=sizes, max_new_tokens=3)
            with loaded.remember_images([method]) as cache:
                cache.encode(["a", "b"], images)
                for order in ([0, 1], [1, 0], [1]):
                    some = [images[i] for i in order], [sizes[i] for i in order], ["ab"[i] for i in order]
                    got = loaded.generate([rows[i] for i in order], some[0], some[1], some[2], max_new_tokens=3)
                    assert torch.equal(got, plain[order])
                assert cache.passes == 8 and cache.hits == 8 + 8 + 5


@pytest.mark.parametrize("form", ["llava", "hf"])
def test_show(form: str, checkpoints: dict[str, str], root: Path, tmp_path: Path, capsys: Any) -> None:
    image = root / MINI / "gqa/data/images/n9000005.jpg"
    argv = ["show", "--image", str(image), "--question", "What is it?", "--model", checkpoints[form], "--new", "2"]
    assert main([*argv, "--tokens", "160", "--out", str(tmp_path / "kept.html"), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers[0]["entering"][0] > 1000 and answers[1]["percent"] < 50
    assert "crops" in (tmp_path / "kept.html").read_text(encoding="utf-8")


def test_crops_without_sizes_are_refused(checkpoints: dict[str, str]) -> None:
    loaded = llava_prune.load(checkpoints["hf"], dtype="float32")
    for pixels, sizes in ((torch.zeros(1, 3, 336, 336), [(5, 5)]), ([torch.zeros(5, 3, 336, 336)], None)):
        with pytest.raises(ValueError, match="sees images in crops; give pixels as a list"):
            loaded.generate([[1, -200]], pixels, sizes=sizes)


def test_a_broken_pinpoint(checkpoints: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["llava"], tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_grid_pinpoints": [[336]]}))
    with pytest.raises(ValueError, match="must be a list of .width, height."):
        protocol_of(str(folder))
