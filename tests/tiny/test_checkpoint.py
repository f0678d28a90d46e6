"""The shipped checkpoint: format, tokenizer, and answers to a few questions."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from playground.tiny import measure as ms
from playground.tiny import tokenizer as tk

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def config(model_dir):
    return json.loads((model_dir / "config.json").read_text())


def test_sizes(model_dir, config):
    assert sum(p.stat().st_size for p in model_dir.rglob("*") if p.is_file()) < 20e6
    assert all(p.stat().st_size < 8e6 for p in model_dir.rglob("*") if p.is_file())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["model_type"] == "llava_llama"
    assert config["num_hidden_layers"] >= 12
    assert config["hidden_size"] // config["num_attention_heads"] >= 32
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    clip = json.loads((model_dir / "clip" / "config.json").read_text())
    assert (clip["image_size"] // clip["patch_size"]) ** 2 == 576


def test_tensor_names(model_dir, config):
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [config["vocab_size"], config["hidden_size"]]
    assert {"lm_head.weight", "model.norm.weight"} <= names
    assert {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")} <= names
    last = config["num_hidden_layers"] - 1
    assert f"model.layers.{last}.self_attn.o_proj.weight" in names
    with safe_open(model_dir / "clip" / "model.safetensors", "pt") as file:
        assert "vision_model.embeddings.class_embedding" in file.keys()  # noqa: SIM118


def test_slow_tokenizer_equals_sentencepiece(model_dir):
    from transformers import AutoTokenizer

    slow, plain = AutoTokenizer.from_pretrained(model_dir, use_fast=False), tk.load(model_dir)
    texts = [*tk.corpus(20), "\n", "\nWhat\n\nis  it?\n", "A\nB ", "你好 \n", "x_y ▁", tk.SYSTEM + " USER: "]
    for text in texts:
        assert slow(text).input_ids == [1, *plain.encode(text)], text
    assert slow.decode(plain.encode("red"), skip_special_tokens=True).strip() == "red"
    assert (slow.bos_token_id, slow.eos_token_id, slow.unk_token_id) == (1, 2, 0)


def test_words_are_single_pieces(model_dir):
    from playground.tiny import scenes as sc

    plain = tk.load(model_dir)
    for word in (*sc.WORDS, *sc.SHAPES, *sc.COLOURS, *sc.SIZES, "yes", "no", "left", "right", "above", "below"):
        assert len(plain.encode(word)) == 1, word


def test_prompt_ids_are_cut_at_the_image(model_dir):
    plain = tk.load(model_dir)
    ids = tk.encode_prompt(plain, tk.prompt("Is it red?"))
    assert ids[0] == 1 and ids.count(tk.IMAGE) == 1 and ids.count(1) == 1
    at = ids.index(tk.IMAGE)
    assert plain.id_to_piece(ids[at + 2]) == "<0x0A>"


def test_answers_questions(model_dir, gqa_dir):
    result = ms.measure(ms.Evaluated(model_dir), gqa_dir, ["full"], 24)
    assert result["full"]["all"] >= 85


def test_cls_attention_prefers_things(model_dir, gqa_dir):
    model = ms.Evaluated(model_dir)
    from playground.tiny import scenes as sc
    from playground.tiny.data import HELD_OUT_SEED

    shares = []
    for i in range(6):
        image = Image.open(gqa_dir / "data" / "images" / f"n{9_000_000 + i}.jpg").convert("RGB")
        scores = model.see(image)[1]
        things = torch.from_numpy(sc.instance_map(sc.make_scene(HELD_OUT_SEED + i)).reshape(-1) > 0)
        shares.append(float(scores[things].mean() / scores[~things].mean()))
    assert min(shares) > 1.5
