"""LLaVA's own entry points run pruned and unchanged, and answer what this package's evaluation answers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llava_prune
from llava_prune.eval.images import open_rgb, pixels
from llava_prune.eval.prompt import token_ids, vicuna_v1

pytest.importorskip("llava")
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "playground" / "models" / "llava-tiny"
GQA = ROOT / "playground" / "data" / "mini" / "gqa"
NEW = 4


@pytest.fixture(scope="module")
def questions():
    text = (GQA / "llava_gqa_testdev_balanced.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[:3]]


@pytest.fixture(scope="module")
def ours(questions):
    loaded = llava_prune.load(MODEL, family="llava", dtype=torch.float32, device="cpu")
    said = []
    with llava_prune.pruned(loaded.model, "autoprune", tokens=64) as handle:
        for row in questions:
            image = open_rgb(GQA / "data" / "images" / row["image"])
            ids = token_ids(vicuna_v1(row["text"]), loaded.tokenizer)
            values = pixels(image, loaded.image_processor, True)[None]
            new = loaded.generate([ids], values, sizes=[image.size], max_new_tokens=NEW)
            assert handle.last.tokens_out[0].float().mean() <= 64.5
            said.append(loaded.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip())
    return said


def run(*program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava_prune", "run", "--method", "autoprune", "--tokens", "64", "--"]
    return subprocess.run(
        [*command, "python", "-m", *program], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )


def test_model_vqa_loader(questions, ours, tmp_path):
    asked, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    done = run(
        "llava.eval.model_vqa_loader", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1",
        "--question-file", str(asked), "--image-folder", str(GQA / "data" / "images"),
        "--answers-file", str(answers), "--temperature", "0", "--max_new_tokens", str(NEW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in questions]
    assert [row["text"].strip() for row in rows] == ours
    assert "64.0 leaving" in " ".join(done.stderr.split())


@pytest.fixture
def projector_only(tmp_path):
    """A checkpoint that is a float16 projector for a base model, with the base's vision tower by its relative name."""
    folder = tmp_path / "llava-tiny-projector"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    weights = load_file(MODEL / "model.safetensors")
    torch.save({k: v.half() for k, v in weights.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    return folder


def test_weights_that_torch_load_reads(projector_only, questions, ours):
    row = questions[0]
    done = run(
        "llava.eval.run_llava", "--model-path", str(projector_only), "--model-base", str(MODEL), "--conv-mode",
        "vicuna_v1", "--query", row["text"], "--image-file", str(GQA / "data" / "images" / row["image"]),
        "--temperature", "0", "--max_new_tokens", str(NEW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(ours[0])


def test_an_adapter_alone_is_refused(projector_only):
    with pytest.raises(ValueError, match="adapter, without the weights of its base model.*merge"):
        llava_prune.load(projector_only, device="cpu")


def test_run_llava(questions, ours):
    row = questions[0]
    done = run(
        "llava.eval.run_llava", "--model-path", str(MODEL), "--conv-mode", "vicuna_v1", "--query", row["text"],
        "--image-file", str(GQA / "data" / "images" / row["image"]), "--temperature", "0",
        "--max_new_tokens", str(NEW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(ours[0])


def test_a_program_that_is_not_llavas_is_refused():
    done = run("json.tool")
    assert done.returncode == 1 and "json.tool" in done.stderr and "llava.eval" in done.stderr
