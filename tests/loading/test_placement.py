"""Device maps and quantised weights: the answers do not depend on the devices of the weights."""

from __future__ import annotations

import copy
import gc
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import llava_prune
from llava_prune.cli import main
from llava_prune.eval import asking, identity
from llava_prune.models.load import Loaded
from llava_prune.models.placement import quantise, stored_tensors
from tests import models
from tests.contract.settings import NAMES, setting

ROWS = [models.prompt(4, 5), models.prompt(7, 3, seed=1)]
FAMILIES = ["llava", "hf"]
LAYERS = {"llava": "model.layers", "hf": "model.language_model.layers"}
EMBEDDINGS = {"llava": "model.embed_tokens", "hf": "model.language_model.embed_tokens"}
TOWER = "model.vision_tower"
needs_bits = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: Any) -> Path:
    return models.write_checkpoint(tmp_path_factory.mktemp("stored") / "tiny")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    """A folder for temporary files, which must be empty once the models of the test are freed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    gc.collect()
    assert not list(tmp_path.glob("llava-prune-*"))


def load(folder: Path, family: Any, **given: Any) -> Loaded:
    return llava_prune.load(folder, family=family, dtype="float32", **given)


def answer(loaded: Loaded, name: str) -> tuple[Any, Any, Any]:
    """Return (logits, kept tokens, new ids)."""
    with llava_prune.pruned(loaded.model, name, **setting(name).hyper) as handle:
        options = {"return_dict_in_generate": True, "output_logits": True}
        out = loaded.generate(ROWS, models.pixels(2), max_new_tokens=3, **options)
        return torch.stack(out.logits), [k.tolist() for k in handle.last.kept], out.sequences.tolist()


def same(one: Loaded, other: Loaded, atol: float = 1e-5) -> None:
    """Check that every method keeps the same tokens and gives the same answers on both models."""
    for name in NAMES:
        got, expected = answer(one, name), answer(other, name)
        assert got[1:] == expected[1:], name
        assert torch.allclose(got[0], expected[0], atol=atol), name


# device maps ------------------------------------------------------------------------------------------------------


def maps(family: str) -> dict[str, dict[str, Any]]:
    """Return arguments of `load` that spread a small model, whose layers take about 160 kB each, over devices.

    accelerate takes a torch.device for a GPU, so that modules on "cpu" are offloaded.
    """
    layers, gpu = LAYERS[family], torch.device("cpu")
    return {
        "by memory": {"device_map": "auto", "max_memory": {"cpu": 1_500_000}},
        "tower and some layers on disk": {"device_map": {"": "cpu", TOWER: "disk", f"{layers}.3": "disk"}},
        "a GPU and CPU memory": {"device_map": {"": gpu, **{f"{layers}.{i}": "cpu" for i in (3, 4, 5)}}},
        "CPU memory and a GPU": {"device_map": {"": "cpu", EMBEDDINGS[family]: gpu, f"{layers}.4": gpu}},
    }


@pytest.mark.parametrize("how", maps("hf"))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_answers_alike(family: str, how: str, stored: Path, temporary: Path) -> None:
    whole, spread = load(stored, family, device="cpu"), load(stored, family, **maps(family)[how])
    assert hasattr(models.language_model(spread.model).layers[4], "_hf_hook")
    assert any(p.is_meta for p in spread.model.parameters())
    assert spread.device == torch.device("cpu")
    same(spread, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_crops(family: str, tmp_path: Path, temporary: Path) -> None:
    """LLaVA-NeXT has a newline parameter that belongs to no layer."""
    folder = models.write_checkpoint(tmp_path / "next" / "tiny", anyres=True)
    whole = load(folder, family, device="cpu")
    spread = load(folder, family, device_map="auto", max_memory={"cpu": 1_500_000})
    size = (2 * models.SIDE, 2 * models.SIDE)
    given = models.inputs(whole.model, [models.prompt(4, 5)], [models.crops(size)], [size])
    kept, logits = [], []
    for loaded in (whole, spread):
        with torch.inference_mode(), llava_prune.pruned(loaded.model, "autoprune", tokens=24) as handle:
            logits.append(torch.stack(models.generate(loaded.model, given, 3).logits))
            kept.append([k.tolist() for k in handle.last.kept])
    assert kept[0] == kept[1] and torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("how", maps("hf"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_is_that_of_the_whole_model(family: str, how: str, stored: Path, temporary: Path) -> None:
    whole, spread = load(stored, family, device="cpu"), load(stored, family, **maps(family)[how])
    assert identity.weights(spread.model) == identity.weights(whole.model)
    assert identity.not_finite(spread.model) == []
    for loaded in (whole, spread):  # of_model needs a tokenizer
        loaded.tokenizer = _Tokenizer()
    assert identity.of_model(spread, "m", None) == identity.of_model(whole, "m", None)
    assert asking.auto_batch(spread, 100) >= 1


class _Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_not_finite_are_found_on_disk(family: str, stored: Path, temporary: Path) -> None:
    spread = load(stored, family, device_map={"": "cpu", f"{LAYERS[family]}.3": "disk"})
    name = f"{LAYERS[family]}.3.mlp.up_proj.weight"
    (file,) = temporary.glob(f"llava-prune-*/{name}.dat")
    values = torch.from_numpy(bytearray_of(file))
    values[5] = torch.nan
    file.write_bytes(values.numpy().tobytes())
    assert identity.not_finite(spread.model) == [name]


def bytearray_of(file: Path) -> Any:
    import numpy as np

    return np.frombuffer(bytearray(file.read_bytes()), dtype=np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_remembered_images_and_the_tower_clock(family: str, stored: Path, temporary: Path) -> None:
    whole = load(stored, family, device="cpu")
    spread = load(stored, family, device_map={"": "cpu", TOWER: "disk"})
    bench: Any = SimpleNamespace(loaded=spread, tower=0.0)
    methods = [llava_prune.build("visionzip", tokens=12)]
    with spread.remember_images(methods), asking.tower_clock(bench), llava_prune.pruned(spread.model, methods[0]):
        asked = [spread.generate(ROWS, models.pixels(2), keys=["a", "b"], max_new_tokens=3).tolist() for _ in range(2)]
    assert asked[0] == asked[1] == answer(whole, "visionzip")[2] and bench.tower > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_fits(family: str, stored: Path, temporary: Path) -> None:
    """A named device map puts a model on one device if that has the memory."""
    for name in ("auto", "balanced", "balanced_low_0", "sequential"):
        loaded = load(stored, family, device_map=name)
        assert not any(p.is_meta for p in loaded.model.parameters()) and not list(temporary.glob("llava-prune-*"))
    assert answer(loaded, "autoprune")[1:] == answer(load(stored, family, device="cpu"), "autoprune")[1:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "device='cpu' and device_map go against each other"),
        ({"device_map": "everywhere"}, "device_map='everywhere' is not known; choose auto, balanced, balanced_low_0"),
        ({"device_map": 3}, "device_map=3 must be a name or a dict"),
        ({"device_map": {}}, "must be a name or a dict"),
        ({"device_map": {"": "cuda:99"}}, "'cuda:99': this machine has"),
        ({"device_map": {"": "cpu", "model.layer.3": "disk"}}, "has no module 'model.layer.3'"),
        ({"device_map": {"lm_head": "cpu"}}, "device_map has no device for model"),
        ({"max_memory": {"cpu": 1}}, "max_memory goes with the name of a device map"),
        ({"device_map": "auto", "load_8bit": True}, "load_8bit with device_map='auto' is not supported"),
        ({"load_8bit": True, "load_4bit": True}, "load_8bit and load_4bit go against each other"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_refusals(family: str, given: dict[str, Any], message: str, stored: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load(stored, family, **given)
    assert "\n" not in str(refused.value)


def test_package_llava_needs_its_embeddings(stored: Path, temporary: Path) -> None:
    with pytest.raises(ValueError, match=r"put model\.embed_tokens on the GPU, or use family='hf'"):
        load(stored, "llava", device_map={"": "disk"})
    same(load(stored, "hf", device_map={"": "disk"}), load(stored, "hf", device="cpu"))


# 8 and 4 bit ------------------------------------------------------------------------------------------------------


def dequantised(model: Any) -> Any:
    """Return a copy of a model in which plain layers with the dequantised weights replace the quantised ones."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Linear4bit":
                weight = dequantize_4bit(child.weight.data, child.weight.quant_state)
            elif type(child).__name__ == "Linear8bitLt":
                weight = int8_vectorwise_dequant(child.weight.data, child.state_dict()["SCB"])
            else:
                continue
            plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
            plain.weight, plain.bias = nn.Parameter(weight.float()), child.bias
            setattr(parent, name, plain)
    return model


def quantised(model: Any) -> set[str]:
    return {n for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


@needs_bits
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantised(family: str, bits: str, stored: Path) -> None:
    """Linear layers of language model and projector are quantised; head and vision tower are not."""
    plain, loaded = load(stored, family, device="cpu"), load(stored, family, device="cpu", **{f"load_{bits}": True})
    linear = {n for n, m in plain.model.named_modules() if type(m) is nn.Linear}
    assert quantised(loaded.model) == {n for n in linear if "vision_tower" not in n and n != "lm_head"}
    assert len(quantised(loaded.model)) == 7 * models.LAYERS + 2
    assert loaded.bits == bits and plain.bits is None


@needs_bits
@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_answers_as_its_dequantised_weights(family: str, stored: Path) -> None:
    loaded = load(stored, family, device="cpu", load_4bit=True)
    layer = models.language_model(loaded.model).layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert state.quant_type == "nf4" and state.nested and layer.compute_dtype is torch.float32
    same(loaded, models.loaded(dequantised(loaded.model)))


@needs_bits
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_answers_as_a_model_quantised_by_hand(family: str, stored: Path) -> None:
    """int8 layers round their activations as well, so the dequantised model is close and not equal."""
    import bitsandbytes as bnb

    loaded = load(stored, family, device="cpu", load_8bit=True)
    by_hand = load(stored, family, device="cpu").model
    for name in quantised(loaded.model):
        parent, _, last = name.rpartition(".")
        old = by_hand.get_submodule(name)
        new: Any = bnb.nn.Linear8bitLt(
            old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        new.load_state_dict(old.state_dict())
        setattr(by_hand.get_submodule(parent), last, new.to("cpu"))
    same(loaded, models.loaded(by_hand))
    unpruned, plain = answer(loaded, "full")[0][0], answer(models.loaded(dequantised(loaded.model)), "full")[0][0]
    assert 0 < (unpruned - plain).abs().max() < 0.2 * plain.abs().max()


@needs_bits
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_identity_of_quantised_weights(bits: str, stored: Path) -> None:
    """The identity is the same after a run and for the same weights quantised again, and depends on the scales."""
    loaded, again = (load(stored, "hf", device="cpu", **{f"load_{bits}": True}) for _ in range(2))
    before = identity.weights(loaded.model)
    answer(loaded, "autoprune")
    assert identity.weights(loaded.model) == identity.weights(again.model) == before
    plain = load(stored, "hf", device="cpu")
    assert identity.weights(plain.model) != before
    with torch.no_grad():
        plain.model.model.language_model.layers[0].mlp.up_proj.weight *= 2
    quantise(plain.model, plain._family, bits, torch.device("cpu"))
    packed = "model.language_model.layers.0.mlp.up_proj.weight"
    one, two = (dict(stored_tensors(m)) for m in (plain.model, loaded.model))
    assert torch.equal(one[packed], two[packed]) and identity.weights(plain.model) != before
    loaded.tokenizer = _Tokenizer()
    found = identity.of_model(loaded, "m", None)
    assert found["bits"] == bits and "bitsandbytes" in found["versions"]


def test_bitsandbytes_that_is_not_installed(stored: Path, monkeypatch: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ValueError, match=r"load_4bit needs the package bitsandbytes \(pip install"):
        load(stored, "hf", load_4bit=True)


# the command line -------------------------------------------------------------------------------------------------


@needs_bits
def test_eval_with_flags_and_environment(tmp_path: Path, root: Path, monkeypatch: Any, capsys: Any) -> None:
    """Answers of a quantised model are not reused for the plain one."""
    data, out = str(root / "playground/data/mini"), str(tmp_path / "out")
    argv = ["eval", "gqa", "--data", data, "--limit", "2", "--no-reference", "--out", out, "--device", "cpu"]
    assert main([*argv, "--load-4bit"]) == 0
    assert main(argv) == 1
    assert "made with bits='4bit', now it is None" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setenv("LOAD_4BIT", "1")
    assert main(argv) == 0
    monkeypatch.setenv("LOAD_4BIT", "yes")
    with pytest.raises(SystemExit):
        main(argv)


def test_eval_with_a_device_map(tmp_path: Path, root: Path) -> None:
    """Runs with and without a device map share their answers."""
    data, out = str(root / "playground/data/mini"), str(tmp_path / "out")
    argv = ["eval", "gqa", "--data", data, "--limit", "2", "--no-reference", "--out", out, "--batch", "2"]
    assert main([*argv, "--device-map", "auto"]) == 0
    assert main(argv) == 0


def test_bench_refuses_a_device_map_for_a_random_model(capsys: Any) -> None:
    assert main(["bench", "--shape", "tiny", "--device-map", "auto"]) == 1
    assert "device_map is for checkpoints, not for the random model of a shape" in capsys.readouterr().err
