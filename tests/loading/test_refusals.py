"""Checkpoints that both packages refuse, always with a ValueError of one line that names the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_prune
from llava_prune.models import checkpoint
from llava_prune.models.config import pick_device

FAMILIES = ["llava", "hf"]
Edit = Callable[[Path], Any]


def load(folder: Path, family: str, **more: Any) -> Any:
    return llava_prune.load(folder, **{"family": family, "dtype": "float32", "device": "cpu", **more})


def config(file: str = "config.json", **entries: Any) -> Edit:
    """Return an edit that changes entries of a JSON file; None removes an entry."""

    def edit(folder: Path) -> None:
        path = folder / file
        table = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({k: v for k, v in {**table, **entries}.items() if v is not None}))

    return edit


def weights(change: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> Edit:
    def edit(folder: Path) -> None:
        table = load_file(folder / file)
        change(table)
        save_file(table, folder / file, metadata={"format": "pt"})

    return edit


def index(value: Any, single: bool = True) -> Edit:
    def edit(folder: Path) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / "model.safetensors.index.json").write_text(text)
        if not single:
            (folder / "model.safetensors").rename(folder / "model-00001.safetensors")

    return edit


def file(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


class Code:
    """An object whose pickle would open a file."""

    def __reduce__(self) -> Any:
        return open, ("code-ran", "w")


def pickled_tower(folder: Path) -> None:
    table = load_file(folder / "clip" / "model.safetensors")
    (folder / "clip" / "model.safetensors").unlink()
    torch.save({**table, "x": Code()}, folder / "clip" / "pytorch_model.bin")


def legacy_list(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")


def half_a_tower(folder: Path) -> None:
    tower = load_file(folder / "clip" / "model.safetensors")
    names = [name for name in sorted(tower) if "position_ids" not in name]
    names.remove("vision_model.embeddings.class_embedding")
    weights(lambda w: w.update({f"model.vision_tower.vision_tower.{n}": tower[n] for n in names}))(folder)
    config(unfreeze_mm_vision_tower=True)(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DEEP = '{"model_type": "llava_llama", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
CLIP, EYES = "clip/model.safetensors", "clip/config.json"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
ANYRES: dict[str, Any] = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[168, 336], [336, 168]],
    "mm_patch_merge_type": "spatial_unpad",
}
NAME = "model.layers.0.mlp.up_proj.weight"
CASES: dict[str, tuple[Edit, str]] = {
    "mistral": (config(model_type="llava_mistral"), "architectures .* is not supported.*a Mistral language model"),
    "type": (config(model_type=["llava"]), r"model_type \['llava'\] is not supported"),
    "mpt": (config(model_type="llava_mpt"), "model_type 'llava_mpt' is not supported"),
    "architecture": (config(architectures=["LlavaQwenForCausalLM"]), "architectures .*LlavaQwen.* is not supported"),
    "architectures text": (config(architectures="x"), "architectures 'x' is not supported"),
    "nested": (file("config.json", DEEP.encode()), "config.json: broken JSON"),
    "quantised": (config(quantization_config={"load_in_4bit": True}), "quantised weights .* not supported"),
    "kernel": (config(attn_implementation="some/kernel"), "attn_implementation='some/kernel' is not supported; choose"),
    "private kernel": (config(_attn_implementation_internal="k"), "attn_implementation='k' is not supported; choose"),
    "feature": (config(mm_vision_select_feature="all"), "mm_vision_select_feature is 'all'; it must be"),
    "layer": (config(mm_vision_select_layer=[1, 2]), r"mm_vision_select_layer is \[1, 2\]; give the layer"),
    "no tower": (config(mm_vision_tower="none/at/all"), "'none/at/all' is neither a folder inside"),
    "tower outside": (config(mm_vision_tower="../llava-tiny/clip"), "'../llava-tiny/clip' is neither a folder inside"),
    "tower's config": (file("clip/config.json", b"{"), "cannot be loaded: .*config.json"),
    "tower's pointer": (file("clip/model.safetensors", POINTER), "clip/model.safetensors is a Git LFS pointer"),
    "tower's code": (pickled_tower, "clip/pytorch_model.bin: holds more than tensors"),
    "tower's cut": (weights(lambda w: w.pop(FC1), CLIP), "clip: 1 tensors are missing, first .*fc1.weight"),
    "tower's more": (
        weights(lambda w: w.update({"x.y": torch.ones(2)}), CLIP),
        "clip: 1 tensors have no place in a CLIP",
    ),
    "tower's integers": (weights(lambda w: w.update({FC1: w[FC1].int()}), CLIP), f"{FC1} holds integers"),
    "tower's shape": (
        weights(lambda w: w.update({FC1: torch.ones(3)}), CLIP),
        r"fc1.weight has shape \(3,\), the config",
    ),
    "tower's depth": (config(EYES, num_hidden_layers=10**30), "num_hidden_layers is 1000.* weights have 5 layers"),
    "tower's heads": (config(EYES, num_attention_heads=-1), "num_attention_heads of the vision tower is -1"),
    "tower's width": (config(EYES, num_attention_heads=3), "cannot be loaded: .*128.* is not a multiple of"),
    "tower's size": (config(EYES, intermediate_size=10**7), "the config asks for .* parameters, the weight files hold"),
    "tower's kind": (config(EYES, model_type="siglip_vision_model"), "must be a CLIP"),
    "tower's parts": (config(EYES, model_type="clip"), "vision_config is None; it must be an object"),
    "tower's index": (
        file("clip/model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
        "clip/model.safetensors.index.json: '../model.safetensors' in weight_map",
    ),
    "tower's processor": (file("clip/preprocessor_config.json", b"{"), "clip/preprocessor_config.json: broken JSON"),
    "layer of no block": (config(mm_vision_select_layer=99), "vision feature layer 99 is not the output of any"),
    "width of features": (config(mm_hidden_size=7), "mm_hidden_size is 7, and the vision tower .* has hidden_size 128"),
    "no width of features": (config(mm_hidden_size=None), "mm_hidden_size is None, and the vision tower .* 128"),
    "half a tower": (half_a_tower, "vision tower: 1 tensors are missing, first .*class_embedding"),
    "left over": (weights(lambda w: w.update({"x.y": torch.ones(2)})), "1 tensors have no place in .*, first .*x.y"),
    "missing": (weights(lambda w: w.pop(NAME)), f"1 tensors are missing, first .*{NAME[6:]}"),
    "shape": (
        weights(lambda w: w.update({NAME: torch.ones(3, 3)})),
        r"up_proj.weight has shape \(3, 3\), the config asks",
    ),
    "integers": (weights(lambda w: w.update({NAME: w[NAME].int()})), "up_proj.weight holds .*int"),
    "not a dict": (legacy_list, "pytorch_model.bin: holds more than tensors"),
    "depth": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000 in the config, .* 12 layers"),
    "no number": (file("config.json", b'{"model_type": "llava", "a": NaN}'), "config.json: broken JSON .NaN is not"),
    "projector": (config(mm_projector_type="mlp999999x_gelu"), "mm_projector_type 'mlp999999x_gelu' is not supported"),
    "projector number": (config(mm_projector_type=5), "mm_projector_type 5 is not supported"),
    "context": (config(tokenizer_model_max_length=[1]), r"tokenizer_model_max_length is \[1\]; it must be a positive"),
    "crops text": (config(**ANYRES | {"image_grid_pinpoints": "[[1, 2]]"}), "must be a list of .width, height."),
    "crops of three": (config(**ANYRES | {"image_grid_pinpoints": [[1, 2, 3]]}), "must be a list of .width, height."),
    "crops merged": (config(**ANYRES | {"mm_patch_merge_type": "x"}), "mm_patch_merge_type is 'x'; it must be one of"),
    "index broken": (index("{"), "index.json: broken JSON"),
    "index list": (index([]), "index.json: expected one JSON object, found a list"),
    "index deep": (index("[" * 100_000), "index.json: broken JSON"),
    "index without map": (index({}), "index.json: expected a weight_map"),
    "index map list": (index({"weight_map": ["a"]}), "index.json: expected a weight_map"),
    "index map empty": (index({"weight_map": {}}), "index.json: expected a weight_map"),
    "index number": (index({"weight_map": {"a": 5}}), "index.json: 5 in weight_map is not the name of a file"),
    "index list value": (index({"weight_map": {"a": []}}), r"index.json: \[\] in weight_map is not the name"),
    "index outside": (
        index({"weight_map": {"a": "../llava-tiny/model.safetensors"}}),
        "'../llava-tiny/model.saf.*' in",
    ),
    "index absolute": (index({"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd' in weight_map is not the name"),
    "index folder": (index({"weight_map": {"a": "clip"}}), "'clip' in weight_map is not the name of a file"),
    "index gone": (index({"weight_map": {"a": "b.safetensors"}}, False), "1 of 1 weight files missing, first b.safe"),
    "tokenizer empty": (file("tokenizer.model", b""), "tokenizer.model is empty; fetch it again"),
    "tokenizer garbage": (file("tokenizer.model", b"garbage" * 9), r"the tokenizer \(tokenizer.model\) cannot be read"),
    "tokenizer.json": (file("tokenizer.json", b"{}"), r"\(tokenizer.model, tokenizer.json\) cannot be read"),
    "tokenizer_config": (file("tokenizer_config.json", b""), "/tokenizer_config.json: broken JSON"),
    "special tokens": (file("special_tokens_map.json", b"[]"), "/special_tokens_map.json: expected one JSON object"),
    "added tokens": (file("added_tokens.json", b"{"), "/added_tokens.json: broken JSON"),
    "tokenizer pointer": (file("tokenizer.model", POINTER), "tokenizer.model is a Git LFS pointer"),
    "generation ids": (
        config("generation_config.json", eos_token_id="x"),
        "eos_token_id is 'x'; it must be a token id",
    ),
    "dtype number": (config(torch_dtype=-1), "torch_dtype is -1; it must be float32, float16 or bfloat16"),
    "dtype text": (config(dtype="linear"), "dtype is 'linear'; it must be float32, float16 or bfloat16"),
    "merge": (config(mm_patch_merge_type=False), "mm_patch_merge_type is False; it must be one of"),
    "window": (config(sliding_window=4096), "sliding_window is 4096, which a Llama language model does not have"),
    "generation broken": (file("generation_config.json", b"{"), "/generation_config.json: broken JSON"),
    "escapes": (weights(lambda w: w.update({"x\x1b[2J\x07\n": torch.ones(1)})), "1 tensors have no place"),
    "generation": (config("generation_config.json", max_new_tokens=-5), "max_new_tokens"),
    "vocabulary": (config(vocab_size=7), "embed_tokens.weight has shape|lm_head.weight has shape"),
    "negative size": (config(hidden_size=-128), "hidden_size is -128; it must be a positive integer"),
    "text for a size": (config(num_hidden_layers="twelve"), "num_hidden_layers is 'twelve'; it must be a positive"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0; it must be a positive integer"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_refused_alike(family: str, name: str, tiny_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    edit, message = CASES[name]
    edit(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        load(folder, family)
    text = str(refused.value)
    assert type(refused.value) is ValueError and str(folder) in text and "\n" not in text and "\x1b" not in text
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_in_the_config_gives_way_to_attn(family: str, tiny_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    config(attn_implementation="some/kernel")(folder)
    assert _backend(load(folder, family, attn="eager")) == "eager"
    config(attn_implementation="eager")(folder)
    assert _backend(load(folder, family)) == "eager" and _backend(load(folder, family, attn="sdpa")) == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_as_they_are_published(family: str, tiny_path: Path, tmp_path: Path) -> None:
    """A complete CLIP with its text model is read as a tower, and a kernel named in its config is not fetched."""
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    table = json.loads((folder / EYES).read_text())
    inner = {k: v for k, v in table.items() if k != "model_type"} | {"attn_implementation": "some/kernel"}
    (folder / EYES).write_text(json.dumps({"model_type": "clip", "vision_config": inner, "text_config": {}}))
    text = {"logit_scale": torch.ones(1), "text_model.encoder.layers.11.mlp.fc1.weight": torch.ones(2)}
    weights(
        lambda w: w.update({**text, "vision_model.embeddings.position_ids": torch.ones(1, dtype=torch.int64)}), CLIP
    )(folder)
    one, other = load(folder, family), load(tiny_path, family)
    assert all(a.equal(b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": 5}, "text_config is 5; it must be"),
        ({"text_config": {}}, "num_hidden_layers is 32 in the config, the weights have 12 layers"),
        ({"text_config": {"num_hidden_layers": 12}}, r"the config asks for [\d,]+ parameters, the weight files hold"),
        ({"vision_feature_layer": 7}, "vision feature layer 7 is not the output"),
        ({"vision_feature_layer": [-2, 9]}, "vision feature layer 9 is not the output"),
        ({"vision_config": {}}, "num_hidden_layers is 12 in the config, the weights have 5 layers"),
        ({"attn_implementation": "some/kernel"}, "attn_implementation='some/kernel' is not supported"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "cannot be loaded: .*GPTQ",
        ),
    ],
)
def test_configs_of_transformers_format(change: dict[str, Any], message: str, converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "llava-hf"))
    config(**change)(folder)
    with pytest.raises(ValueError, match=message) as refused:
        load(folder, "hf")
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def converted(tiny_path: Path, tmp_path_factory: Any) -> Path:
    """llava-tiny in transformers' format."""
    folder = Path(tmp_path_factory.mktemp("converted"))
    load(tiny_path, "hf").model.save_pretrained(folder)
    return folder


def test_crops_that_transformers_packs_otherwise(tiny_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    config(**ANYRES | {"mm_patch_merge_type": None})(folder)
    assert load(folder, "llava").family == "llava"
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'flat', and transformers .* use family='llava'"):
        load(folder, "hf")


def _backend(loaded: Any) -> str:
    text = getattr(loaded.model.config, "text_config", None) or loaded.model.config
    return str(text._attn_implementation)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "foo"}, "device='foo' is not known; give cuda, cuda:1 or cpu"),
        ({"device": "meta"}, "device='meta' holds no weights"),
        ({"device": "cpu:x"}, "is not known"),
        ({"device": "cpu:3"}, "device='cpu:3' is not known; there is one cpu"),
        ({"device": "hpu"}, "device='hpu': this machine does not have it"),
        ({"device": 5.5}, "device=5.5 is not known"),
        ({"attn": "foo"}, "attn='foo' is not supported; choose eager, sdpa, flash_attention_2"),
        ({"dtype": "int8"}, "dtype='int8': choose float32, float16 or bfloat16"),
    ],
)
def test_arguments(asked: dict[str, Any], message: str, tiny_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_path, "hf", **asked)


@pytest.mark.parametrize(("count", "asked", "fine"), [(0, "cuda", False), (2, "cuda:1", True), (2, "cuda:2", False)])
def test_cuda_devices(count: int, asked: str, fine: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if fine:
        assert pick_device(asked) == torch.device(asked)
    else:
        with pytest.raises(ValueError, match=f"device='{asked}': this machine has {count} CUDA devices"):
            pick_device(asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_flash_attention_without_its_package(tiny_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="attn='flash_attention_2' needs the package flash-attn .pip install"):
        load(tiny_path, "hf", attn="flash_attention_2")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("a\nb"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_lack_of_memory(error: Exception, tiny_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(checkpoint, "load_converted", full)
    with pytest.raises(ValueError, match="llava-tiny does not fit into the memory of cpu; use a smaller dtype"):
        load(tiny_path, "hf")


class Panic(BaseException):
    """An error that is not an Exception, like the panics of Rust extensions."""


def test_panics_and_interrupts(tiny_path: Path, monkeypatch: Any) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(checkpoint, "load_converted", fails)
    error: BaseException = Panic("called\n`unwrap()`")
    with pytest.raises(ValueError, match="llava-tiny cannot be loaded: Panic: called `unwrap"):
        load(tiny_path, "hf")
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load(tiny_path, "hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_type_of_before_2024(family: str, tiny_path: Path, tmp_path: Path) -> None:
    """A model_type of `llava` without a text_config means LLaVA's format: the same tokenizer, model and answers."""
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    config(model_type="llava")(folder)
    old, new = load(folder, family), load(tiny_path, family)
    text = "A chat.  USER: what</s> is it?\nASSISTANT:"
    assert old.tokenizer(text).input_ids == new.tokenizer(text).input_ids
    assert type(old.tokenizer) is type(new.tokenizer) and type(old.model) is type(new.model)
    assert all(a.equal(b) for a, b in zip(old.model.parameters(), new.model.parameters(), strict=True))
    pixels = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    prompt = [[1, 5, 6, -200, 7, 8, 9]]
    assert old.generate(prompt, pixels, max_new_tokens=4).equal(new.generate(prompt, pixels, max_new_tokens=4))


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", None])
def test_projectors_of_other_depth(kind: str | None, tiny_path: Path, tmp_path: Path) -> None:
    """Package llava builds projectors of the depth that the weights have; transformers supports a single kind."""
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    config(mm_projector_type=kind)(folder)
    with pytest.raises(ValueError, match="mm_projector_type is '(linear|mlp3x_gelu)', and .* family='llava'"):
        load(folder, "hf")
    with pytest.raises(ValueError, match="tensors are missing|have no place"):
        load(folder, "llava")

    def deeper(table: dict[str, Any]) -> None:
        for part, size in (("weight", (128, 128)), ("bias", (128,))):
            table[f"model.mm_projector.4.{part}"] = torch.ones(size, dtype=torch.float16)
        if kind != "mlp3x_gelu":
            for name in [n for n in table if "mm_projector" in n]:
                value = table.pop(name)
                if ".0." in name:
                    table[name.replace(".0.", ".")] = value

    weights(deeper)(folder)
    loaded = load(folder, "llava")
    pixels = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    with llava_prune.pruned(loaded.model, "autoprune", tokens=64):
        assert loaded.generate([[1, 5, -200, 7]], pixels, max_new_tokens=2).shape[0] == 1


def test_left_over_tensors_in_transformers_format(tiny_path: Path, tmp_path: Path) -> None:
    load(tiny_path, "hf").model.save_pretrained(tmp_path)
    weights(lambda w: w.update({"x.y": torch.ones(2)}))(tmp_path)
    with pytest.raises(ValueError, match="1 tensors have no place in .*, first x.y"):
        load(tmp_path, "hf")
    weights(lambda w: (w.pop("x.y"), w.update({sorted(w)[5]: w[sorted(w)[5]].int()})))(tmp_path)
    with pytest.raises(ValueError, match="holds integers"):
        load(tmp_path, "hf")


def test_a_single_file_is_read_before_an_index(tiny_path: Path, tmp_path: Path) -> None:
    """As in transformers, a single weight file takes precedence over an index of other files, in both packages."""
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    table = load_file(folder / "model.safetensors")
    save_file(
        {n: torch.zeros_like(v) for n, v in table.items()}, folder / "other.safetensors", metadata={"format": "pt"}
    )
    index({"weight_map": dict.fromkeys(table, "other.safetensors")})(folder)
    for family in FAMILIES:
        assert load(folder, family).model.get_output_embeddings().weight.abs().sum() > 0


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("family", FAMILIES)
def test_remote_code_neither_runs_nor_asks(
    family: str, where: str, tiny_path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = Path(shutil.copytree(tiny_path, tmp_path / "llava-tiny"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w')\nclass C: pass\nclass T: pass\n")
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.C", "AutoTokenizer": ["evil.T", None]}
    config(where, auto_map=auto)(folder)

    def asked(*_: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    try:
        assert load(folder, family).n_visual == 576
    except ValueError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "code-ran").exists()
