"""Loading of checkpoints in both formats, complete and broken. No code from a file may run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_prune
from llava_prune.models.base import block_index
from llava_prune.models.checkpoint import rename
from llava_prune.models.config import SMALL, pick_dtype, weight_bytes
from llava_prune.models.family import family_of
from llava_prune.models.files import load_tokenizer
from tests import models

FAMILIES = ["llava", "hf"]
Copy = Callable[[], Path]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_checkpoint(tmp_path_factory.mktemp("stored") / "tiny")


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to break."""
    return Path(shutil.copytree(stored, tmp_path / "tiny"))


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load(folder: Path, family: str) -> Any:
    return llava_prune.load(folder, family=family, dtype="float32", device="cpu")


def as_published(folder: Path) -> None:
    """Make a checkpoint like liuhaotian/llava-v1.5-7b: pickled shards, an index, rotary buffers, tower by hub id."""
    state = load_file(folder / "model.safetensors")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(models.LAYERS)}
    names = sorted(state, key=lambda n: n.startswith(("model.mm_projector", "lm_head", "model.layers.5")))
    cut = len(names) * 2 // 3
    where = {}
    for i, part in enumerate((names[:cut], names[cut:]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({n: state[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()
    tower = "openai/clip-vit-large-patch14-336"
    (folder / "openai").mkdir()
    (folder / "clip").rename(folder / tower)
    old = {"model_type": "llava", "mm_vision_tower": tower, "transformers_version": "4.31.0", "mm_hidden_size": 64}
    edit(
        folder, **old, freeze_mm_mlp_adapter=False, pretraining_tp=1, rope_scaling=None, unfreeze_mm_vision_tower=False
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pickled_shards_load_as_safetensors_do(family: str, copied: Path, tiny_models: Any, logits: Any) -> None:
    as_published(copied)
    got = load(copied, family)
    assert got.family == family and got.tokenizer is None and got.n_visual == models.PATCHES
    given = models.inputs(got.model, [models.prompt(4, 5)], models.pixels(1))
    assert torch.equal(logits(got.model, given), logits(tiny_models[family], given))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_in_the_checkpoint_wins(family: str, copied: Path, tiny_models: Any, logits: Any) -> None:
    """A checkpoint that was trained with its tower unfrozen contains the tower, which is then used."""
    state = load_file(copied / "model.safetensors")
    for name, value in models.tower(77).state_dict().items():
        state[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = value
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    edit(copied, unfreeze_mm_vision_tower=True)
    got = load(copied, family).model
    given = models.inputs(got, [models.prompt(4, 5)], models.pixels(1))
    other = models.tiny_hf()
    tower = models.tower(77).state_dict()
    assert other.model.vision_tower.load_state_dict(tower, strict=False).unexpected_keys == []
    assert torch.equal(logits(got, given), logits(other, models.inputs(other, [models.prompt(4, 5)], models.pixels(1))))
    assert not torch.equal(logits(got, given), logits(tiny_models[family], given))


def test_names_of_tensors() -> None:
    table = {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.31.mlp.up_proj.weight": "model.language_model.layers.31.mlp.up_proj.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "model.image_newline": "model.image_newline",
        "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
        "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    }
    assert {old: rename(old) for old in table} == table


def test_placeholder_is_one_past_the_vocabulary(stored: Path) -> None:
    got = load(stored, "hf").model
    assert got.config.image_token_id == models.VOCAB
    assert got.lm_head.weight.shape[0] == models.VOCAB
    assert got.get_input_embeddings().num_embeddings == models.VOCAB + 1


def test_auto_is_llava_for_its_own_format(stored: Path) -> None:
    assert load(stored, "auto").family == "llava"


def test_transformers_format(stored: Path, tmp_path: Path, tiny_models: Any, logits: Any) -> None:
    """A checkpoint as published by llava-hf, with own tensor names and a vocabulary that includes the placeholder."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    text = LlamaConfig(**{k: models.config()[k] for k in keys}, vocab_size=192, max_position_embeddings=4096)
    config = LlavaConfig(
        vision_config=models.tower().config, text_config=text, image_token_id=150, vision_feature_layer=-2
    )
    model = LlavaForConditionalGeneration(config)
    state = {rename(k): v for k, v in models.llm_state().items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(64, models.WIDTH)])
    state |= {f"model.vision_tower.{k}": v for k, v in models.tower(1).state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "hf")
    got = load(tmp_path / "hf", "auto")
    assert got.family == "hf" and got.image_processor is None and got.model.config.image_token_id == 150
    twin = tiny_models["hf"]
    rows, pixels = [models.prompt(4, 5)], models.pixels(1)
    a = logits(got.model, models.inputs(got.model, rows, pixels))[:, : models.VOCAB]
    assert torch.allclose(a, logits(twin, models.inputs(twin, rows, pixels)), atol=1e-5)
    with pytest.raises(ValueError, match="family='hf'"):
        load(tmp_path / "hf", "llava")
    weights = next((tmp_path / "hf").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated|incomplete|corrupt"):
        load(tmp_path / "hf", "hf")


# broken checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
class TestBroken:
    def test_cut_off_safetensors(self, family: str, copied: Path) -> None:
        file = copied / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(ValueError, match="truncated"):
            load(copied, family)

    def test_cut_off_pickle(self, family: str, copied: Path) -> None:
        as_published(copied)
        file = copied / "pytorch_model-00002-of-00002.bin"
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(ValueError, match="tiny"):
            load(copied, family)

    def test_no_weight_file_at_all(self, family: str, copied: Path) -> None:
        (copied / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="no weights"):
            load(copied, family)

    def test_not_weights(self, family: str, copied: Path) -> None:
        (copied / "model.safetensors").write_text("<html>404</html>" * 50)
        with pytest.raises(ValueError, match="tiny"):
            load(copied, family)

    def test_code_in_a_pickle_does_not_run(self, family: str, copied: Path, tmp_path: Path) -> None:
        (copied / "model.safetensors").unlink()
        proof = tmp_path / "ran"
        torch.save({"model.norm.weight": torch.ones(64), "x": Touch(str(proof))}, copied / "pytorch_model.bin")
        with pytest.raises(ValueError, match="tiny"):
            load(copied, family)
        assert not proof.exists()

    def test_shard_that_is_not_there(self, family: str, copied: Path) -> None:
        as_published(copied)
        (copied / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(ValueError, match=r"1 of 2 weight files missing, first pytorch_model-00002"):
            load(copied, family)

    def test_tensor_that_is_not_there(self, family: str, copied: Path) -> None:
        state = load_file(copied / "model.safetensors")
        del state["model.layers.3.mlp.up_proj.weight"], state["model.mm_projector.2.bias"]
        save_file(state, copied / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="2 tensors are missing"):
            load(copied, family)

    def test_tensor_of_another_size(self, family: str, copied: Path) -> None:
        edit(copied, intermediate_size=96)
        with pytest.raises(ValueError, match="tiny"):
            load(copied, family)

    def test_tower_that_is_not_there(self, family: str, copied: Path) -> None:
        edit(copied, mm_vision_tower="/nowhere/clip")
        with pytest.raises(ValueError, match="/nowhere/clip"):
            load(copied, family)

    @pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[1]", "{", "\xff\xfe"])
    def test_foreign_or_broken_config(self, family: str, content: str, copied: Path) -> None:
        (copied / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=r"config\.json"):
            load(copied, family)

    def test_no_config(self, family: str, copied: Path) -> None:
        (copied / "config.json").unlink()
        with pytest.raises(ValueError, match=r"no config\.json"):
            load(copied, family)


class Touch:
    """An object whose pickle writes a file when a loader runs its code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "one", "a/b/c"])
def test_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        llava_prune.load(path)


def test_arguments_are_checked(stored: Path) -> None:
    with pytest.raises(ValueError, match="family='both'"):
        llava_prune.load(stored, family="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype='int8'"):
        llava_prune.load(stored, family="hf", dtype="int8")


@pytest.mark.parametrize(
    ("size", "expected"), [(0, torch.float32), (SMALL - 1, torch.float32), (SMALL, torch.bfloat16)]
)
def test_small_checkpoints_are_computed_in_float32_on_a_cpu(size: int, expected: torch.dtype) -> None:
    """Small checkpoints in half precision are computed in float32 on a CPU and as stored on a GPU."""
    for stored in ("float16", "bfloat16"):
        assert pick_dtype(None, {"torch_dtype": stored}, torch.device("cpu"), size) is expected
        assert pick_dtype(None, {"torch_dtype": stored}, torch.device("cuda"), size) is getattr(torch, stored)
    assert pick_dtype("bfloat16", {"torch_dtype": "float16"}, torch.device("cpu"), size) is torch.bfloat16


def test_the_weight_files_are_weighed(tmp_path: Path) -> None:
    """Weight files of both formats count, other files do not."""
    for name, size in (("model-00001.safetensors", 5), ("pytorch_model.bin", 7), ("config.json", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 12


@pytest.mark.parametrize(
    ("asked", "stored_as", "device", "expected"),
    [
        (None, "float16", "cpu", torch.bfloat16),
        (None, "float16", "cuda", torch.float16),
        (None, "torch.float32", "cpu", torch.float32),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("fp16", "float32", "cpu", torch.float16),
        (torch.float64, "float32", "cpu", torch.float64),
        (None, None, "cuda", torch.float16),
    ],
)
def test_dtype(asked: Any, stored_as: Any, device: str, expected: torch.dtype) -> None:
    assert pick_dtype(asked, {"torch_dtype": stored_as}, torch.device(device)) is expected


@pytest.mark.parametrize(("layer", "depth", "block"), [(-2, 24, 22), (-1, 24, 23), (1, 4, 0), (4, 4, 3)])
def test_feature_layers(layer: int, depth: int, block: int) -> None:
    assert block_index(layer, depth) == block


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_feature_layers_that_no_block_makes(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} is not the output"):
        block_index(layer, 4)


def test_foreign_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a supported LLaVA model"):
        family_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear is not a supported LLaVA model"):
        llava_prune.attach(torch.nn.Linear(2, 2), "full")


@pytest.mark.parametrize("method", [3, None, llava_prune.Method])
def test_what_is_no_method_is_refused(method: Any, tiny_models: Any) -> None:
    with pytest.raises(ValueError, match="neither a method's name nor a Method"):
        llava_prune.attach(tiny_models["hf"], method)


def test_hyper_parameters_go_with_a_name(tiny_models: Any) -> None:
    with pytest.raises(ValueError, match="built already"):
        llava_prune.attach(tiny_models["hf"], llava_prune.build("full"), tokens=3)


def edited(tiny_path: Path, place: Path, weights: Any = None, **config: Any) -> Path:
    """Copy llava-tiny with another config (None removes an entry) or other weights."""
    folder = place / "llava-tiny"
    shutil.copytree(tiny_path, folder)
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    table = {k: v for k, v in {**table, **config}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(table), encoding="utf-8")
    if weights is not None:
        changed = weights(load_file(folder / "model.safetensors"))
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answers(folder: Path) -> list[Any]:
    """Return the first new ids from both packages' classes."""
    out = []
    for family in ("llava", "hf"):
        loaded: Any = llava_prune.load(folder, family=family, dtype="float32", device="cpu")  # type: ignore[arg-type]
        side = loaded.image_processor.crop_size["height"]
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        out.append(loaded.generate([[1, 5, 6, -200, 7, 8, 9]], pixels, max_new_tokens=4).tolist())
    return out


@pytest.mark.parametrize("family", ["llava", "hf"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_vision_tower": None}, "mm_vision_tower is None; name the vision tower"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None; give the layer"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": None}, "image_grid_pinpoints is missing"),
        ({"model_type": "llava_qwen"}, "model_type 'llava_qwen' is not supported"),
    ],
)
def test_configs_that_leave_something_open(
    family: Any, config: dict[str, Any], message: str, tiny_path: Path, tmp_path: Path
) -> None:
    """Both packages refuse a config that they would complete in different ways."""
    with pytest.raises(ValueError, match=message):
        llava_prune.load(edited(tiny_path, tmp_path, **config), family=family)


@pytest.mark.parametrize("family", ["llava", "hf"])
def test_weights_without_a_place_are_refused(family: Any, tiny_path: Path, tmp_path: Path) -> None:
    """Attention biases, as other architectures have them, are refused and not dropped."""
    bias = {"model.layers.3.self_attn.q_proj.bias": torch.ones(128, dtype=torch.float16)}
    folder = edited(tiny_path, tmp_path, lambda w: {**w, **bias})
    with pytest.raises(ValueError, match="1 tensors have no place in .*language model, first .*q_proj.bias"):
        llava_prune.load(folder, family=family)


@pytest.mark.parametrize("head", [True, False])
def test_tied_embeddings(head: bool, tiny_path: Path, tmp_path: Path) -> None:
    """A checkpoint without an lm_head uses its embeddings; one with an lm_head keeps its own."""
    folder = edited(
        tiny_path, tmp_path, lambda w: {k: v for k, v in w.items() if head or k != "lm_head.weight"},
        tie_word_embeddings=True,
    )  # fmt: skip
    one, other = answers(folder)
    assert one == other and (one == answers(tiny_path)[0]) == head


def test_the_towers_own_weights_count(tiny_path: Path, tmp_path: Path) -> None:
    """Tower weights in a checkpoint whose tower was not trained are ignored by both packages."""
    tower = load_file(tiny_path / "clip" / "model.safetensors")
    names = {k: k if k.startswith("vision_model") else f"vision_model.{k}" for k in tower if "position_ids" not in k}
    zeros = {f"model.vision_tower.vision_tower.{name}": torch.zeros_like(tower[k]) for k, name in names.items()}
    base = answers(tiny_path)[0]
    assert answers(edited(tiny_path, tmp_path / "frozen", lambda w: {**w, **zeros})) == [base, base]
    one, other = answers(
        edited(tiny_path, tmp_path / "trained", lambda w: {**w, **zeros}, unfreeze_mm_vision_tower=True)
    )
    assert one == other != base


def test_features_with_the_class_token(tiny_path: Path, tmp_path: Path) -> None:
    one, other = answers(edited(tiny_path, tmp_path, mm_vision_select_feature="cls_patch"))
    assert one == other


def test_older_weight_files(tiny_path: Path, tmp_path: Path) -> None:
    """Weight files from before torch's zip format are read."""
    folder = edited(tiny_path, tmp_path)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert answers(folder) == answers(tiny_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "model.safetensors", "config.json"])
def test_git_lfs_pointers(name: str, tiny_path: Path, tmp_path: Path) -> None:
    folder = edited(tiny_path, tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 13\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer and not the file; run `git lfs pull`"):
        llava_prune.load(folder)


def test_a_tokenizer_that_protobuf_does_not_read(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval pins packages that bring a protobuf older than sentencepiece's; see docs/toolkits.md."""
    import sentencepiece
    import transformers

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError(r"Error parsing line b'\x0e'")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(ValueError, match=r"tokenizer.model\) cannot be read .*Error parsing line"):
        load_tokenizer(tiny_path, original=True)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ValueError, match=r"sentencepiece and protobuf do not go together .*'sentencepiece<0.2.3'"):
        load_tokenizer(tiny_path, original=True)


@pytest.mark.parametrize("rows", [[], [[]], [1, 5, 6], "what is this?", ["what is this?"], [[1, 5], []], [[1.5]], None])
def test_prompts_are_token_ids(rows: Any, tiny: Any) -> None:
    with pytest.raises(ValueError, match="rows=.*: must be a list of prompts, each a list of token ids"):
        models.loaded(tiny).generate(rows)


@pytest.mark.parametrize("argument", ["attention_mask", "input_ids", "inputs", "images", "pixel_values", "image_sizes"])
def test_arguments_that_generate_makes(argument: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} for Loaded.generate, which makes them from rows, pixels"):
        models.loaded(tiny).generate([[1, 5, 6]], **{argument: torch.ones(1, 3, dtype=torch.long)})
