"""LoRA folders and lone projectors with the checkpoint that they were trained on, in both packages' classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llava_prune
from llava_prune.cli import main

FAMILIES = ["llava", "hf"]
RANK = 4
Weights = dict[str, Tensor]


def write(folder: Path, weights: Weights, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def whole(tiny_path: Path) -> tuple[Weights, dict[str, Any]]:
    """Weights and config of llava-tiny, with a projector other than that of the file."""
    weights = {k: v.float() for k, v in load_file(tiny_path / "model.safetensors").items()}
    noise = torch.Generator().manual_seed(5)
    for name in weights:
        if "mm_projector" in name:
            weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=noise)
    config = json.loads((tiny_path / "config.json").read_text())
    return weights, {**config, "mm_vision_tower": str((tiny_path / "clip").resolve()), "torch_dtype": "float32"}


@pytest.fixture(scope="module")
def trained(whole: Any, tiny_path: Path, tmp_path_factory: Any) -> Path:
    """A complete checkpoint with the trained projector: the expected result for a projector and its base."""
    weights, config = whole
    folder = write(tmp_path_factory.mktemp("trained") / "llava-tiny", weights, **config)
    copy_tokenizer(tiny_path, folder)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder)


@pytest.fixture(scope="module", params=["vicuna", "llava"])
def base(request: Any, whole: Any, tiny_path: Path, tmp_path_factory: Any) -> Path:
    """A language model without a projector, or a LLaVA with another projector."""
    weights, config = whole
    place = tmp_path_factory.mktemp("base")
    if request.param == "llava":
        shutil.copytree(tiny_path, place / "llava-tiny")
        return Path(place / "llava-tiny")
    text = {k: v for k, v in config.items() if not k.startswith("mm_")}
    text |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    folder = write(place / "vicuna", {k: v for k, v in weights.items() if "mm_projector" not in k}, **text)
    copy_tokenizer(tiny_path, folder)
    return folder


def projector(whole: Any, folder: Path) -> Path:
    """Write a folder as LLaVA's pretraining leaves it."""
    weights, config = whole
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({k: v for k, v in weights.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    return folder


def lora(whole: Any, folder: Path, suffix: str = ".bin", ranks: dict[str, int] | None = None, **more: Any) -> Path:
    """Write a folder as LLaVA's LoRA training leaves it."""
    weights, config = whole
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stated = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "lora_dropout": 0.0}
    stated |= {"target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "none", **more}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    draw, parts = torch.Generator().manual_seed(7), {}
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "v_proj", "down_proj")) and "layers" in module:
            rank = (ranks or {}).get(module.rpartition(".")[2], RANK)
            parts[f"base_model.model.{module}.lora_A.weight"] = 0.2 * torch.randn(rank, value.shape[1], generator=draw)
            parts[f"base_model.model.{module}.lora_B.weight"] = 0.2 * torch.randn(value.shape[0], rank, generator=draw)
    if suffix == ".bin":
        torch.save(parts, folder / "adapter_model.bin")
    else:
        save_file(parts, folder / "adapter_model.safetensors")
    beside = {f"base_model.model.{k}": v for k, v in weights.items() if "mm_projector" in k}
    torch.save(beside, folder / "non_lora_trainables.bin")
    return folder


def load(path: Path, family: Any, **more: Any) -> Any:
    return llava_prune.load(path, family=family, dtype="float32", device="cpu", **more)


def logits(loaded: Any) -> Tensor:
    side = loaded.image_processor.crop_size["height"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    out = loaded.generate(
        [[1, 5, 6, -200, 7, 8, 9]], pixels, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projector_with_its_base(family: str, whole: Any, base: Path, trained: Path, tmp_path: Path) -> None:
    """A projector with its base equals the complete checkpoint, bit for bit; the tokenizer is the base's."""
    loaded = load(projector(whole, tmp_path / "pretrain"), family, model_base=base)
    assert logits(loaded).equal(logits(load(trained, family)))
    want = load(trained, family).tokenizer("What color is it?").input_ids
    assert loaded.tokenizer("What color is it?").input_ids == want and len(want) > 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_a_tower_inside_the_adapter_or_its_base(
    family: str, where: str, whole: Any, tiny_path: Path, trained: Path, tmp_path: Path
) -> None:
    """A relative name of the tower is looked up in both folders, in the adapter's first."""
    folder = projector(whole, tmp_path / "pretrain")
    place = Path(shutil.copytree(tiny_path, tmp_path / "base"))
    (place / "clip").rename(place / "eyes")
    if where == "adapter":
        shutil.copytree(place / "eyes", folder / "eyes")
        (place / "eyes" / "model.safetensors").write_bytes(b"not read")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "mm_vision_tower": "eyes"}))
    assert logits(load(folder, family, model_base=place)).equal(logits(load(trained, family)))


def test_new_tokens_beside_a_lora(whole: Any, tiny_path: Path, trained: Path, tmp_path: Path) -> None:
    """Embeddings of a larger vocabulary replace those of the base; both packages agree."""
    folder, more = lora(whole, tmp_path / "llava-tiny-lora"), 3
    weights, config = whole
    size, beside = config["vocab_size"] + more, torch.load(folder / "non_lora_trainables.bin")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        last = weights[name][:more] * 2
        beside[f"base_model.model.{name}"] = torch.cat([weights[name], last])
    torch.save(beside, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    one, other = (logits(load(folder, family, model_base=tiny_path)) for family in FAMILIES)
    assert one.shape[-1] == size
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(one[..., -more:], 2 * one[..., :more], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_beside_a_whole_model(family: str, whole: Any, trained: Path, tmp_path: Path) -> None:
    """An adapter beside a model is refused: transformers would apply it, a reader of the weights would not."""
    folder = Path(shutil.copytree(trained, tmp_path / "llava-tiny"))
    shutil.copy(lora(whole, tmp_path / "lora") / "adapter_config.json", folder)
    with pytest.raises(ValueError, match="llava-tiny: an adapter .adapter_config.json. beside the weights"):
        load(folder, family)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("suffix", "ranks", "config"),
    [
        (".bin", {}, {}),
        (".safetensors", {}, {"use_rslora": True}),
        (".bin", {"v_proj": 2, "down_proj": 8}, {"rank_pattern": {"v_proj": 2, "mlp.down_proj": 8}}),
        (".bin", {}, {"alpha_pattern": {"layers.3.self_attn.q_proj": 32, r".*\.v_proj": 2}}),
    ],
)
def test_lora_equals_pefts_merge(
    family: str, suffix: str, ranks: Any, config: Any, whole: Any, base: Path, trained: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    folder = lora(whole, tmp_path / "llava-tiny-lora", suffix, ranks, **config)
    want = load(trained, "llava")
    plain = logits(want)
    want.model = peft.PeftModel.from_pretrained(want.model, str(folder)).merge_and_unload()
    got = logits(load(folder, family, model_base=base))
    torch.testing.assert_close(got, logits(want), atol=2e-4, rtol=1e-4)
    assert (got - plain).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_an_adapter_alone(family: str, kind: str, whole: Any, tmp_path: Path) -> None:
    folder = (lora if kind == "lora" else projector)(whole, tmp_path / "x")
    with pytest.raises(ValueError, match=r"an adapter, without the weights .* as model_base \(--model-base\)"):
        load(folder, family)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (lambda f: stated(f, use_dora=True), "use_dora is not a plain LoRA"),
    "modules": (lambda f: stated(f, modules_to_save=["lm_head"]), "modules_to_save is not a plain LoRA"),
    "fan in": (lambda f: stated(f, fan_in_fan_out=True), "fan_in_fan_out is not a plain LoRA"),
    "bias": (lambda f: stated(f, bias="all"), "bias 'all' is not a plain LoRA"),
    "kind": (lambda f: stated(f, peft_type="IA3"), "peft_type 'IA3'"),
    "pissa": (lambda f: stated(f, init_lora_weights="pissa"), "init_lora_weights 'pissa', which changes the base,"),
    "later peft": (lambda f: stated(f, kasa_config={"a": 1}), "kasa_config is not a plain LoRA"),
    "integers": (
        lambda f: resaved(f, lambda w: {k: v.int() for k, v in w.items()}),
        "adapter_model.bin: .* holds integers",
    ),
    "integers beside": (
        lambda f: torch.save(
            {"base_model.model.lm_head.weight": torch.ones(2, dtype=torch.int64)}, f / "non_lora_trainables.bin"
        ),
        "non_lora_trainables.bin: .*lm_head.weight holds integers",
    ),
    "size beside": (
        lambda f: torch.save({"base_model.model.lm_head.weight": torch.ones(2, 2)}, f / "non_lora_trainables.bin"),
        "lm_head.weight|tensors are missing",
    ),
    "alpha": (lambda f: stated(f, lora_alpha=None), "lora_alpha is null; it must be a number"),
    "rank": (lambda f: stated(f, r=16), "has rank 16, the weights have 4"),
    "json": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: broken JSON"),
    "no weights": (lambda f: (f / "adapter_model.bin").unlink(), "no adapter_model.safetensors or adapter_model.bin"),
    "other tensors": (lambda f: resaved(f, lambda w: {**w, "x": torch.ones(1)}), "x is not a part of a plain LoRA"),
    "A alone": (
        lambda f: resaved(f, lambda w: {k: v for k, v in w.items() if "lora_B" not in k}),
        "no matching A and B",
    ),
    "width": (
        lambda f: resaved(f, lambda w: {k: v[:, :-1] if "lora_A" in k else v for k, v in w.items()}),
        "does not fit",
    ),
    "module": (
        lambda f: resaved(f, lambda w: {k.replace("layers.11", "layers.99"): v for k, v in w.items()}),
        "layers.99.* does not fit",
    ),
    "beside": (
        lambda f: torch.save({"base_model.model.y.z": torch.ones(2)}, f / "non_lora_trainables.bin"),
        "1 tensors have no place in .*language model, first .*y.z",
    ),
    "cut off": (lambda f: (f / "adapter_model.bin").write_bytes(b"PK\3\4"), "truncated or no weight file"),
}


def stated(folder: Path, **more: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def resaved(folder: Path, change: Callable[[Weights], Weights]) -> None:
    torch.save(change(torch.load(folder / "adapter_model.bin")), folder / "adapter_model.bin")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHANGES)
def test_adapters_that_are_refused(family: str, name: str, whole: Any, tiny_path: Path, tmp_path: Path) -> None:
    folder = lora(whole, tmp_path / "llava-tiny-lora")
    change, message = CHANGES[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        load(folder, family, model_base=tiny_path)
    assert "llava-tiny-lora" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_that_are_refused(family: str, whole: Any, tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a complete checkpoint, which needs no model_base; leave out"):
        load(tiny_path, family, model_base=tiny_path)
    folder = projector(whole, tmp_path / "p")
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        load(folder, family, model_base=tmp_path / "none")
    other = write(tmp_path / "qwen", {"a": torch.ones(1)}, model_type="qwen2")
    with pytest.raises(ValueError, match="model_base=.*model_type 'qwen2' is not supported"):
        load(folder, family, model_base=other)
    hf = write(tmp_path / "hf", {"a": torch.ones(1)}, model_type="llava", text_config={})
    with pytest.raises(ValueError, match="model_base=.*is not supported"):
        load(folder, family, model_base=hf)


def test_an_evaluation_of_an_adapter(whole: Any, base: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    """An adapter with its base gives the answers of the complete checkpoint; the settings name the base."""
    folder, texts = projector(whole, tmp_path / "pretrain"), []
    argv = ["eval", "gqa", "--limit=6", "--batch=3", "--tokens=64", "--no-reference", "--method=fastervlm"]
    for name, more in (("a", [f"--model={folder}", f"--model-base={base}"]), ("b", [f"--model={trained}"])):
        assert main([*argv, f"--out={tmp_path / name}", *more]) == 0
        lines = (tmp_path / name / "fastervlm-64" / "answers.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["text"] for line in lines])
    assert texts[0] == texts[1]
    stored = [json.loads((tmp_path / n / "fastervlm-64" / "settings.json").read_text()) for n in "ab"]
    assert stored[0]["weights"] == stored[1]["weights"] and stored[0]["model_base"] == str(base)
    assert main([*argv, f"--out={tmp_path / 'c'}", f"--model={folder}"]) == 1
    assert "--model-base" in capsys.readouterr().err
