"""Prompts, token ids and pixels equal vectors recorded with LLaVA's own code."""

from __future__ import annotations

import io
import json
import random
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from llava_prune.cli import main
from llava_prune.eval import images, run
from llava_prune.eval.data import inspect
from llava_prune.eval.images import crops, open_rgb, pixels, square
from llava_prune.eval.plan import Settings
from llava_prune.eval.prompt import TEMPLATES, bare, check_tokenizer, first_turn, token_ids
from llava_prune.eval.protocol import PROCESSOR, protocol_of
from llava_prune.eval.task import load_task, task_names

HERE = Path(__file__).parent
PROMPTS = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))["prompts"]
PIXELS = json.loads((HERE / "preprocess.json").read_text(encoding="utf-8"))
SOURCE = {name: name for name in task_names()} | {"mme": "MME", "ocrbench": "OCRBench"}
FILE = {name: "mmbench_dev" if name.startswith("mmbench") else "llava_" for name in task_names()}
FILE["ocrbench"] = "OCRBench.json"
FILE["vqav2"] = "llava_vqav2_mscoco_test-dev"


@pytest.mark.parametrize("name", [n for n, p in PROMPTS.items() if "line_text" in p])
def test_prompt_strings(name: str) -> None:
    assert first_turn(PROMPTS[name]["line_text"]) == PROMPTS[name]["prompt"]


LETTERS = "What is it?\nAnswer."


@pytest.mark.parametrize("mode", [m for m in TEMPLATES if m not in ("llava_llama_3", "qwen_1_5")])
@pytest.mark.parametrize("image", [True, False])
def test_templates_equal_llavas(mode: str, image: bool) -> None:
    conversation = pytest.importorskip("llava.conversation").conv_templates[mode].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{LETTERS}" if image else LETTERS)
    conversation.append_message(conversation.roles[1], None)
    assert first_turn(LETTERS, image, mode) == conversation.get_prompt()


def test_templates_of_llava_next() -> None:
    """The templates equal those of LLaVA-NeXT's conversation.py and of Llama 3, which package llava lacks."""
    system = "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    system += "user provides, and assist the user with a variety of tasks using natural language."
    assert first_turn("Why?", True, "llava_llama_3") == (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert first_turn("Why?", True, "qwen_1_5") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


POINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (999, 333), (50, 60), (1, 7), (672, 672), (2000, 1501)])
def test_crops_equal_llavas(size: tuple[int, int]) -> None:
    mm_utils = pytest.importorskip("llava.mm_utils")
    processor = transformers.CLIPImageProcessorPil(**PIXELS["processor"])
    image = pattern(*size)
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=POINTS)
    want = mm_utils.process_images([image], processor, config)[0]
    assert crops(image, processor, tuple((w, h) for w, h in POINTS)).equal(want)


ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": POINTS}
ORIGINAL = {"mm_vision_tower": "clip", "mm_vision_select_layer": -2}
PROTOCOLS: list[tuple[str, dict[str, Any], str]] = [
    ("llava-v1.5-7b", {"model_type": "llava_llama", "vocab_size": 32000}, "vicuna_v1"),
    ("llava-v1.6-vicuna-7b", {"model_type": "llava_llama", **ANYRES}, "vicuna_v1"),
    ("renamed", {"model_type": "llava_mistral", **ANYRES}, "mistral_instruct"),
    ("llava-v1.6-34b", {"model_type": "llava_llama", **ANYRES}, "chatml_direct"),
    ("renamed", {"model_type": "llava_llama", "vocab_size": 64000, **ANYRES}, "chatml_direct"),
    ("llama3-llava-next-8b", {"model_type": "llava_llama", "vocab_size": 128256, **ANYRES}, "llava_llama_3"),
    ("llava-llama-2-13b-chat", {"model_type": "llava_llama"}, "llava_llama_2"),
    ("llava-1.5-7b-hf", {"model_type": "llava", "text_config": {"vocab_size": 32064}}, "vicuna_v1"),
    ("x-hf", {"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "mistral_instruct"),
    ("x", {"model_type": "llava", "text_config": {"model_type": "qwen2"}}, "qwen_1_5"),
    ("x", {"model_type": "llava", "text_config": {}, "vision_config": {"model_type": "siglip"}}, PROCESSOR),
    ("x", {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}}, PROCESSOR),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "mode"), PROTOCOLS)
def test_the_template_is_the_checkpoints(name: str, config: dict[str, Any], mode: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    whole = config if "text_config" in config else {**ORIGINAL, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    found = protocol_of(str(folder))
    assert found.conv_mode == mode
    cut = whole["model_type"] in ("llava_next", "llava_onevision") or "image_grid_pinpoints" in whole
    assert bool(found.resolutions) == cut
    if whole["model_type"] != "llava_onevision":
        assert protocol_of(str(folder), "llava_v1").conv_mode == "llava_v1"
    with pytest.raises(ValueError, match="--conv-mode v9: choose one of vicuna_v1, .*, processor"):
        protocol_of(str(folder), "v9")


def test_questions_without_the_instruction() -> None:
    asked = "What is red?\nAnswer the question using a single word or phrase."
    assert bare(asked, "gqa") == "What is red?" and bare("What is red?", "gqa") == "What is red?"
    asked = "Which?\nA. red\nAnswer with the option's letter from the given choices directly."
    assert bare(asked, "sqa") == "Which?\nA. red" and bare(asked, "mmbench_cn") == asked


def test_gqa_suffix_is_the_question_files() -> None:
    task = load_task("gqa")
    assert not task.add_suffix and task.max_new_tokens == 128
    assert PROMPTS["short_answer (gqa, vqav2, pope, mme)"]["line_text"].endswith("\n" + task.suffix)


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width].astype(np.int64)
    return Image.fromarray(
        np.stack([(7 * x + 3 * y) % 256, (2 * x + 11 * y) % 256, (x * x + y) % 256], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("case", PIXELS["cases"], ids=lambda c: f"{c['width']}x{c['height']}")
def test_pixels(case: dict) -> None:
    processor = transformers.CLIPImageProcessorPil(**PIXELS["processor"])
    image = pattern(case["width"], case["height"])
    assert square(image, tuple(PIXELS["background"])).size == tuple(case["square"])
    for key, pad in (("padded", True), ("no_pad_center_crop", False)):
        if not case.get(key):
            continue
        got = pixels(image, processor, pad)
        assert got.shape == (3, 336, 336)
        assert float(got.double().mean()) == pytest.approx(case[key]["mean"], abs=1e-6)
        for where, value in case[key]["points"].items():
            c, row, column = map(int, where.split(","))
            assert float(got[c, row, column]) == pytest.approx(value, abs=1e-6)


def test_an_unreadable_image(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="x.jpg is not a readable image"):
        open_rgb(tmp_path / "x.jpg")


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^.*x.png cannot be read \(No such file or directory\); give an image file$"):
        open_rgb(tmp_path / "x.png")
    with pytest.raises(ValueError, match="cannot be read .Is a directory"):
        open_rgb(tmp_path)


def test_images_of_16_bits(tmp_path: Path) -> None:
    """A grey of 16 bits is that grey of 8 bits; Pillow's own conversion makes it white."""
    samples = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    for kind in ("png", "tiff"):
        Image.fromarray(samples).save(tmp_path / f"x.{kind}")
        found = np.asarray(open_rgb(tmp_path / f"x.{kind}"))
        assert (found == (samples // 256)[..., None]).all(), kind


def test_an_image_above_the_limit_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message asks for fewer pixels: the file is intact, so fetching it again would not help."""
    pattern(30, 20).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x.png has more than 200 pixels, Pillow.*600 pixels.*fewer pixels"):
        open_rgb(tmp_path / "x.png")


class Letters:
    """A tokenizer with one id for each character, BOS 1."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, bos: bool = True) -> None:
        self.bos = bos

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=([1] if self.bos else []) + [ord(c) for c in text])

    def __len__(self) -> int:
        return 300


def test_pieces_are_tokenised_one_by_one() -> None:
    assert token_ids("a<image>\nb", Letters()) == [1, 97, -200, 10, 98]
    assert token_ids("a<image>b<image>c", Letters()) == [1, 97, -200, 98, -200, 99]
    assert token_ids("a<image>b", Letters(bos=False)) == [97, -200, 98]


def test_token_ids_equal_llavas() -> None:
    mm_utils = pytest.importorskip("llava.mm_utils")
    prompt = first_turn("Is it?\nAnswer.")
    assert token_ids(prompt, Letters()) == mm_utils.tokenizer_image_token(prompt, Letters(), -200)


def test_tokenizers_of_other_models() -> None:
    config = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    check_tokenizer(Letters(), 300, config, "here")
    with pytest.raises(ValueError, match="here has no tokenizer"):
        check_tokenizer(None, 300, config, "here")
    with pytest.raises(ValueError, match="300 pieces but the model embeds 299"):
        check_tokenizer(Letters(), 299, config, "here")
    with pytest.raises(ValueError, match="eos_token_id is 2, the model's is 5"):
        check_tokenizer(Letters(), 300, SimpleNamespace(bos_token_id=1, eos_token_id=5), "here")


# images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 2), (2, 300), (301, 3), (3, 301), (257, 100), (97, 200), (1, 500), (500, 1)])
@pytest.mark.parametrize("canvas", [1, 700, 30_000])
def test_images_of_an_extreme_shape(size: tuple[int, int], canvas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path without the square canvas gives the same pixels, however many rows it takes at a time."""
    processor = transformers.CLIPImageProcessorPil(**PIXELS["processor"])
    image = pattern(*size)
    want = pixels(image, processor)
    monkeypatch.setattr(images, "CANVAS", canvas)
    monkeypatch.setattr(images, "square", None)  # not called
    assert pixels(image, processor).equal(want)


@pytest.mark.parametrize("size", [(60_000, 1), (3, 20_000)])
def test_no_canvas_of_gigabytes(size: tuple[int, int]) -> None:
    """60000 x 1 pixels padded to a square would take 10 GB."""
    processor = transformers.CLIPImageProcessorPil(**PIXELS["processor"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pixels(pattern(*size), processor).shape == (3, 336, 336)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB


def test_images_that_are_too_large_to_prepare() -> None:
    processor = transformers.CLIPImageProcessorPil(**PIXELS["processor"])
    with pytest.raises(ValueError, match="the image has 70000 x 1 pixels; a side may have 65535"):
        pixels(pattern(70_000, 1), processor)
    with pytest.raises(ValueError, match="60000 x 1 pixels, which resizing to a shortest edge of 336 without padding"):
        pixels(pattern(60_000, 1), processor, pad=False)


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "DDS", "QOI", "AVIF", "ICO", "PCX", "SGI", "TGA", "BLP", "EPS")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images_of_every_format(kind: str, tmp_path: Path) -> None:
    """A damaged image is opened or refused with one line that names the file, whatever the decoder raises."""
    buffer, path, draw = io.BytesIO(), tmp_path / "damaged.bin", random.Random(kind)
    try:
        (pattern(40, 30).convert("P") if kind == "BLP" else pattern(40, 30)).save(buffer, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(min(len(data), 200))] = draw.choice([0, 255, draw.randrange(256)])
        path.write_bytes(data[: draw.choice([len(data), draw.randrange(1, len(data))])])
        try:
            assert open_rgb(path).mode == "RGB"
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error) and "\n" not in str(error)


def evaluation(task: str, data: Path, out: Path) -> Settings:
    return Settings(task=task, model="a/b", data=str(data), out=str(out), tokens=(4,), batch=2)


# questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", task_names())
@pytest.mark.parametrize(("mark", "says"), [("<image>", "'<image>'"), ("\\ud800", r"\\ud800")])
def test_texts_that_no_prompt_can_hold(
    bench: str, mark: str, says: str, nine: Path, tmp_path: Path, stand_in: Any
) -> None:
    """The error names file, row and id before any answer; ScienceQA's runner removes <image> from its questions."""
    shutil.copytree(nine, tmp_path / "data")
    path = next(p for p in (tmp_path / "data" / SOURCE[bench]).glob("*") if p.name.startswith(FILE[bench]))
    if path.suffix == ".tsv" and mark != "<image>":
        pytest.skip("a table has no escapes, and bytes that are not UTF-8 are refused by the reader")
    text = path.read_text(encoding="utf-8")
    word = "是什么" if bench == "mmbench_cn" else "What" if bench == "mmbench" else "so very"
    if bench == "mme":
        word = "so very" if "so very" in text else "red"
    assert word in text
    path.write_text(text.replace(word, mark + word), encoding="utf-8")
    model = stand_in()
    given = Settings(
        task=bench, model="a/b", data=str(tmp_path / "data"), out=str(tmp_path / "o"), tokens=(4,), batch=2
    )
    if bench == "sqa" and mark == "<image>":
        assert run.evaluate(given) and model.calls
        return
    with pytest.raises(
        ValueError, match=rf"{path.name}, row \d+ \(question_id .*\): the text contains {says}"
    ) as error:
        run.evaluate(given)
    assert not model.calls and "\n" not in str(error.value)
    assert "[Errno" not in str(error.value)


def test_texts_that_the_tokenizer_refuses(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    model = stand_in()

    def refuse(self: Any, text: str) -> Any:
        if "blue" in text:
            raise RuntimeError("no\nblue")
        return SimpleNamespace(input_ids=[1, *map(ord, text)])

    model.tokenizer = type("T", (type(model.tokenizer),), {"__call__": refuse})()
    given = evaluation("gqa", nine, tmp_path / "o")
    with pytest.raises(
        ValueError, match=r'jsonl, row 2 \(question_id "1"\): the tokenizer refuses.*RuntimeError: no\)'
    ):
        run.evaluate(given)
    model = stand_in()
    model.model.config.max_position_embeddings = 250
    with pytest.raises(
        ValueError,
        match=r"row 1 \(question_id .0.\): the prompt has .* context 250",
    ):
        run.evaluate(given)
    assert not model.calls


def test_images_are_opened_before_the_first_question(nine: Path, tmp_path: Path, stand_in: Any) -> None:
    shutil.copytree(nine / "gqa", tmp_path / "gqa")
    (tmp_path / "gqa" / "data" / "images" / "n1.png").write_bytes(b"no image")
    model = stand_in()
    given = evaluation("gqa", tmp_path, tmp_path / "o")
    with pytest.raises(ValueError, match=r'row 2 \(question_id "1"\): .*n1.png is not a readable image'):
        run.evaluate(given)
    assert not model.calls


def test_labels_of_other_questions_are_found_before_the_first_question(
    nine: Path, tmp_path: Path, stand_in: Any
) -> None:
    shutil.copytree(nine / "pope", tmp_path / "pope")
    shutil.copytree(nine / "MME", tmp_path / "MME")
    labels = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    labels.write_text(labels.read_text().replace("red", "green"))
    asked = tmp_path / "MME" / "llava_mme.jsonl"
    asked.write_text(asked.read_text().partition("\n")[2])  # the first image has one question left
    model = stand_in()
    for name, message in (("pope", "random: question .* and label .* do not match"), ("mme", "are not of one image")):
        with pytest.raises(ValueError, match=message):
            run.evaluate(evaluation(name, tmp_path, tmp_path / "o"))
        (problem,) = inspect(name, tmp_path)["problems"]
        assert re.search(message, problem)
    assert not model.calls


@pytest.mark.parametrize(
    "config",
    [
        {"image_aspect_ratio": "anyres_max_9"}, {"image_aspect_ratio": "highres"}, {"image_aspect_ratio": 5},
        {"mm_use_im_start_end": True},
    ],
)  # fmt: skip
def test_other_protocols_are_refused(config: dict, tmp_path: Path) -> None:
    whole = {"model_type": "llava_llama", "mm_vision_tower": "clip", "mm_vision_select_layer": -2, **config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="which the protocols of LLaVA-1.5 and LLaVA-1.6 do not cover"):
        protocol_of(str(tmp_path))


def test_a_processor_of_another_size(tiny_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "llava-tiny")
    place = folder / "clip" / "preprocessor_config.json"
    table = json.loads(place.read_text())
    place.write_text(json.dumps({**table, "crop_size": {"height": 224, "width": 224}}))
    given = Settings(model=str(folder), out=str(tmp_path / "o"), limit=2, batch=2)
    with pytest.raises(ValueError, match="crops to 224 x 224 pixels, and the vision tower takes 168 x 168"):
        run.evaluate(given)


@pytest.mark.parametrize(("aspect", "pad"), [(None, False), ("square", False), ("pad", True)])
def test_padding_is_the_checkpoints(aspect: str | None, pad: bool, tmp_path: Path) -> None:
    whole = {"model_type": "llava_llama", "mm_vision_tower": "clip", "mm_vision_select_layer": -2}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "image_aspect_ratio": aspect}))
    assert protocol_of(str(tmp_path)).pad is pad


def test_the_padding_mask_of_scienceqa(nine: Path, tmp_path: Path, stand_in: Any, capsys: Any) -> None:
    """The padding mask is off, as in the official runner, unless METHOD_ARGS set it; other benchmarks have it on."""
    for bench, more, want in (
        ("sqa", [], False),
        ("sqa", ["--method-args=mask_padding=true"], True),
        ("gqa", [], True),
    ):
        stand_in()
        out = tmp_path / f"{bench}{len(more)}"
        argv = [
            "eval",
            bench,
            "--model=a/b",
            f"--data={nine}",
            f"--out={out}",
            "--tokens=4",
            "--method=autoprune,autoprune-flash",
        ]
        assert main([*argv, *more]) == 0
        for label in ("autoprune-4", "autoprune-flash-4"):
            assert json.loads((out / label / "settings.json").read_text())["hyper"]["mask_padding"] is want
        assert ("mask_padding=False, as in the official runner" in capsys.readouterr().out) is not want
