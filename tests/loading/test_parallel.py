"""Tensor parallelism: two processes on CPUs (gloo) answer as one, with every method."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import llava_prune
from llava_prune.eval import identity
from llava_prune.models import parallel
from llava_prune.models.hf import HF
from tests import models
from tests.contract.settings import NAMES
from tests.loading.parallel_worker import answers

WORKER = "tests.loading.parallel_worker"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would take GPUs")


def launch(root: Path, processes: int, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the worker under torchrun, or alone; it ends by itself after its limit."""
    head = [sys.executable, "-m"]
    if processes > 1:
        head += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*head, WORKER, *argv], cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: Any) -> dict[str, Path]:
    """Checkpoints with as many key heads as query heads, and with half as many."""
    place = tmp_path_factory.mktemp("stored")
    heads = {"heads": models.HEADS, "grouped heads": models.HEADS // 2}
    return {name: models.write_checkpoint(place / name / "tiny", kv_heads=n) for name, n in heads.items()}


@pytest.fixture(scope="module")
def alone(stored: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Answers of the whole models in one process, which are the same in both families."""
    return {n: answers(llava_prune.load(f, family="hf", dtype="float32", device="cpu")) for n, f in stored.items()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that kept tokens and new ids are equal, and logits close."""
    assert found.keys() == expected.keys() == set(NAMES)
    for name, (logits, kept, new) in expected.items():
        got = found[name]
        assert not isinstance(got, str), f"{name}: {got}"
        assert got[1] == kept and got[2] == new, name
        assert torch.allclose(got[0], logits, atol=1e-4), name


@needs_cpu
@pytest.mark.parametrize(
    ("engine", "family", "heads"),
    [
        ("tp", "llava", "grouped heads"),
        ("tp", "hf", "heads"),
        pytest.param("deepspeed", "llava", "heads", marks=needs_deepspeed),
        pytest.param("deepspeed", "hf", "grouped heads", marks=needs_deepspeed),
        pytest.param("own", "hf", "heads", marks=needs_deepspeed),
    ],
)
def test_two_processes_answer_as_one(
    engine: str, family: Any, heads: str, stored: dict[str, Path], alone: Any, root: Path, tmp_path: Path
) -> None:
    """`own` is a DeepSpeed engine that the user makes, which splits the vision tower as well."""
    done = launch(root, 2, engine, family, str(stored[heads]), str(tmp_path))
    older = Version(transformers.__version__) < Version("5.24")
    if older and engine == "tp" and "engine='tp' is not supported with transformers" in done.stderr:
        pytest.skip("this release of transformers can split a model only while loading it")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["engine"] == (None if engine == "own" else engine)
    for found in (first, second):
        same(found["answers"], alone[heads])
    assert all(torch.equal(first["answers"][n][0], second["answers"][n][0]) for n in NAMES)
    whole = identity.weights(llava_prune.load(stored[heads], family=family, dtype="float32", device="cpu").model)
    assert first["weights"] == second["weights"] == whole


@needs_cpu
@pytest.mark.parametrize("engine", ["tp", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_one_process(engine: str, stored: dict[str, Path], alone: Any) -> None:
    """An engine works in one process without torchrun."""
    loaded = llava_prune.load(stored["heads"], family="hf", dtype="float32", engine=engine)
    assert loaded.engine == engine
    same(answers(loaded), alone["heads"])


def test_heads_that_cannot_be_shared(tiny_models: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    with pytest.raises(ValueError, match="num_attention_heads is 4, which 3 processes cannot share"):
        parallel.split(tiny_models["hf"], HF(), "tp", torch.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "vllm"}, "engine='vllm' is not known; choose deepspeed or tp"),
        ({"engine": "tp", "device": "cpu"}, "engine='tp' with device='cpu' is not supported"),
        ({"engine": "tp", "device_map": "auto"}, "engine='tp' with device_map='auto' is not supported"),
        ({"engine": "tp", "load_4bit": True}, "load_4bit with engine='tp' is not supported"),
    ],
)
def test_refusals(given: dict[str, Any], message: str, tiny_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        llava_prune.load(tiny_path, **given)
    assert "\n" not in str(refused.value)


def test_deepspeed_that_is_not_installed(tiny_path: Path, monkeypatch: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name))
    with pytest.raises(ValueError, match=r"needs the package deepspeed \(pip install deepspeed\)"):
        llava_prune.load(tiny_path, engine="deepspeed")
