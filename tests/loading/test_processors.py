"""Checkpoints in transformers' format with a processor: chat templates, AutoProcessor, pipeline, evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

import llava_prune
from llava_prune.eval import run
from llava_prune.eval.plan import Settings
from llava_prune.eval.protocol import PROCESSOR, protocol_of
from llava_prune.models.hf import counted_crops, most_crops
from llava_prune.models.load import read_size
from tests import combinations

SIDE = 168
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "next-mistral": ("next", "mistral", "clip", {}),
    "next-llama-3": ("next", "llama", "clip", {"rope_parameters": LLAMA_3}),
    "llava-qwen2": ("llava", "qwen2", "clip", {}),
    "onevision": ("onevision", "qwen2", "siglip", {}),
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTION = "What is red?"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


def write(folder: Path, name: str, tiny_path: Path) -> None:
    """Write a random checkpoint as transformers saves it, with processor, tokenizer and chat template."""
    kind, language, tower, more = KINDS[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    text = {"vocab_size": len(tokenizer) + 2, "eos_token_id": 2, **more}
    tokens = {"video_token_index": video} if kind == "onevision" else {}
    config = combinations.config(kind, language, tower, text, SIDE, image_token_index=image, **tokens)
    name = f"{combinations.CLASSES[kind]}ForConditionalGeneration"
    combinations.randomise(getattr(transformers, name)(config)).save_pretrained(folder)
    plain = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if kind == "llava":
        images: Any = transformers.CLIPImageProcessorPil(**plain)
    elif kind == "next":
        images = transformers.LlavaNextImageProcessorPil(**plain, image_grid_pinpoints=config.image_grid_pinpoints)
    else:
        square = {"height": SIDE, "width": SIDE}
        images = transformers.LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=config.image_grid_pinpoints
        )
    if kind == "onevision":  # its processor class needs torchvision
        images.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return
    build = getattr(transformers, f"{combinations.CLASSES[kind]}Processor")
    build(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Path]:
    out = {}
    for name in KINDS:
        out[name] = tmp_path_factory.mktemp("hf") / name
        write(out[name], name, root / "playground/models/llava-tiny")
    return out


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Any]:
    """The name of a kind, and its loaded checkpoint."""
    loaded = llava_prune.load(folders[request.param], dtype="float32", device="cpu")
    if loaded.processor is None and Version(transformers.__version__) < Version("5.20"):  # LLaVA-OneVision's
        pytest.skip("older releases of transformers cannot load the image processor without torchvision")
    return request.param, loaded


def substitute(name: str) -> dict[str, Any]:
    """Return the argument that AutoPrune needs with a tower without a class token, an extension to the paper."""
    return {"class_token": "received"} if name == "onevision" else {}


def picture(seed: int = 0, size: tuple[int, int] = (400, 180)) -> Image.Image:
    draw = torch.Generator().manual_seed(seed)
    small = (torch.rand(5, 7, 3, generator=draw) * 255).to(torch.uint8).numpy()
    return Image.fromarray(small).resize(size)


def processed(name: str, loaded: Any, image: Image.Image) -> dict[str, Any]:
    """Return model inputs for a question about an image, from AutoProcessor or, for LLaVA-OneVision, from its parts."""
    processor = loaded.processor
    if name != "onevision":
        text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        return dict(processor(images=image, text=text, return_tensors="pt"))
    text = processor.tokenizer.apply_chat_template(
        MESSAGES, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    count = loaded.visual_tokens(image.size)
    ids = processor.tokenizer(text.replace("<image>", "<image>" * count), return_tensors="pt")
    images = processor.image_processor(images=image, return_tensors="pt")
    return {**ids, "pixel_values": images["pixel_values"], "image_sizes": images["image_sizes"]}


def test_generate_through_the_processor(checkpoint: tuple[str, Any]) -> None:
    name, loaded = checkpoint
    given = processed(name, loaded, picture())
    before = int((given["input_ids"] == loaded.model.config.image_token_id).sum())
    greedy = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    with torch.inference_mode():
        stock = loaded.model.generate(**given, **greedy)
        with llava_prune.pruned(loaded.model, "autoprune", tokens=64, **substitute(name)) as handle:
            out = loaded.model.generate(**given, **greedy)
        assert torch.equal(loaded.model.generate(**given, **greedy), stock)
    assert out.shape[1] > given["input_ids"].shape[1]
    assert handle.last.tokens_in[0, 0] == before == loaded.visual_tokens((400, 180))
    assert handle.last.tokens_out.float().mean() == pytest.approx(64, abs=2)


def test_the_evaluations_prompt_is_the_processors(checkpoint: tuple[str, Any], folders: dict[str, Path]) -> None:
    name, loaded = checkpoint
    protocol = protocol_of(str(folders[name]), PROCESSOR)
    protocol.check(loaded, name)
    given = processed(name, loaded, picture())
    ids, token = protocol.token_ids(QUESTION, True, loaded), loaded.model.config.image_token_id
    count = loaded.visual_tokens((400, 180))
    assert [t for i in ids for t in ([token] * count if i == -200 else [i])] == given["input_ids"][0].tolist()
    assert torch.equal(protocol.pixels(picture(), loaded), given["pixel_values"][0])
    pixels = protocol.pixels(picture(), loaded)
    images = [pixels] if pixels.ndim == 4 else pixels[None]
    with llava_prune.pruned(loaded.model, "uniform", tokens=64):
        ours = loaded.generate([ids], images, sizes=[(400, 180)], max_new_tokens=4)
        theirs = loaded.model.generate(**given, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert ours[0].tolist() == theirs[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["next-mistral", "next-llama-3", "llava-qwen2"])
def test_pipeline(name: str, folders: dict[str, Path]) -> None:
    loaded = llava_prune.load(folders[name], dtype="float32", device="cpu")
    pipe = transformers.pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor)
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
    with llava_prune.pruned(pipe, "autoprune", tokens=64) as handle:
        out = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3)
    assert out and handle.last.tokens_out.float().mean() == pytest.approx(64, abs=2)
    assert handle.model is loaded.model and not handle.attached
    pipe.model = torch.nn.DataParallel(loaded.model)
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        llava_prune.attach(pipe, "autoprune", tokens=64)


def evaluated(folder: Path, out: Path, name: str, batch: int) -> list[Any]:
    settings = Settings(
        task="gqa", model=str(folder), data="playground/data/mini", tokens=(64,), out=str(out), limit=6, batch=batch,
        conv_mode=PROCESSOR, dtype="float32", max_new_tokens=3, method_args=substitute(name),
    )  # fmt: skip
    rows = []
    for result in run.evaluate(settings):
        assert result["settings"]["conv_mode"] == PROCESSOR
        lines = (out / result["label"] / "answers.jsonl").read_text().splitlines()
        rows.append([(r["text"], r["kept"]) for r in map(json.loads, lines)])
    return rows


def test_evaluation_with_the_processor(checkpoint: tuple[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    name = checkpoint[0]
    single = evaluated(folders[name], tmp_path / "one", name, 1)
    assert evaluated(folders[name], tmp_path / "four", name, 4) == single
    assert single[0] != single[1]


def test_tokens_that_papers_count(folders: dict[str, Path]) -> None:
    """Counts are those of the largest number of crops; LLaVA-OneVision interpolates large images to ten crops."""
    patches = (SIDE // 14) ** 2
    assert (
        read_size(folders["next-mistral"]).visual == 5 * patches and read_size(folders["llava-qwen2"]).visual == patches
    )
    loaded = llava_prune.load(folders["next-mistral"], dtype="float32", device="cpu")
    assert loaded.size == read_size(folders["next-mistral"]) and loaded.max_visual > loaded.size.visual
    config = transformers.LlavaOnevisionConfig()
    assert (most_crops(config), counted_crops(config)) == (37, 10)


def test_onevision_is_asked_by_its_processor_alone(folders: dict[str, Path]) -> None:
    assert protocol_of(str(folders["onevision"])).conv_mode == PROCESSOR
    with pytest.raises(ValueError, match="does not preprocess; leave out --conv-mode vicuna_v1, or give processor"):
        protocol_of(str(folders["onevision"]), "vicuna_v1")


def test_a_checkpoint_without_a_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["next-mistral"], tmp_path / "x"))
    (folder / "chat_template.jinja").unlink()
    loaded = llava_prune.load(folder, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="--conv-mode processor needs .* chat template"):
        protocol_of(str(folder), PROCESSOR).check(loaded, str(folder))


def test_a_chat_template_file_without_a_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["onevision"], tmp_path / "x"))
    for file in folder.glob("chat_template.*"):
        file.unlink()
    (folder / "chat_template.json").write_text("{}")
    loaded = llava_prune.load(folder, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="needs .* chat template"):
        protocol_of(str(folder), PROCESSOR).check(loaded, str(folder))


def test_a_broken_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["next-mistral"], tmp_path / "x"))
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"processor_config.json: broken JSON"):
        llava_prune.load(folder)


def test_other_language_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["next-mistral"], tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="'gemma2' .* is not supported; it must be one of llama, mistral, qwen2, qwen3"
    ):
        llava_prune.load(folder)
