"""The identity of a run: everything that can change an answer, as values and checksums.

It is stored beside the answers and compared when a run resumes; see `answers.Answers`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.checks import json_values
from ..methods.planner import Run
from ..models.parallel import gather_tensor, processes
from ..models.placement import stored_tensors
from .plan import Settings
from .task import Task

PACKAGES = ("llava-prune", "torch", "transformers", "tokenizers", "llava-torch", "pillow", "numpy")
"""Packages whose version can change an answer."""
WORKERS = 8
"""Number of threads that read images."""
_PLACES = ("_name_or_path", "name_or_path", "mm_vision_tower", "transformers_version")
"""Config entries that say where a model came from."""
_ELSEWHERE = ("torch_dtype", "dtype", "_attn_implementation", "_attn_implementation_internal", "attn_implementation")
"""Config entries that are compared as settings of their own."""


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that an answer depends on, and of `more`."""
    out = {}
    for name in (*PACKAGES, *more):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def checksum(value: Any) -> str:
    """Return the sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tensors(model: Any) -> Iterable[tuple[str, Tensor]]:
    """Return names and values of all parameters and buffers, sorted by name, also of a split or offloaded model."""
    return ((name, gather_tensor(model, name, t)) for name, t in stored_tensors(model))


def not_finite(model: Any) -> list[str]:
    """Return the names of parameters and buffers with NaN or infinite values."""
    with torch.inference_mode():
        return [
            name
            for name, t in _tensors(model)
            if t.is_floating_point() and t.numel() and not torch.stack(torch.aminmax(t)).isfinite().all()
        ]


def weights(model: Any) -> str:
    """Return the sha256 of every parameter and buffer of a model: name, dtype, shape and all bytes, sorted by name.

    The checksum does not depend on the device, the device map, the number of processes, or the files of the checkpoint.
    It takes about 8 seconds for a model of 7B parameters in half precision. All processes of an engine must call it.
    """
    h = hashlib.sha256()
    with torch.inference_mode():
        for name, t in _tensors(model):
            h.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
            h.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _plain(value: Any) -> Any:
    """Return a config as JSON stores it, without entries that do not change an answer or are compared elsewhere."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _PLACES and k not in _ELSEWHERE}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def vision_tower(loaded: Any) -> Any:
    """Return the module that encodes images when called."""
    model = loaded.model
    return model.get_vision_tower() if loaded.family == "llava" else model.model.vision_tower


def configs(loaded: Any) -> str:
    """Return the sha256 of the configs of a model, its generation, its vision tower and its image processor."""
    tower = getattr(vision_tower(loaded), "config", None)
    images = loaded.image_processor
    if images is None:
        images = getattr(getattr(loaded, "processor", None), "image_processor", None)
    return checksum([_plain(p) for p in (loaded.model.config, loaded.model.generation_config, tower, images)])


def tokenizer(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer: its class, vocabulary and special ids."""
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "unk_token_id")}
    return checksum([type(tokenizer).__name__, tokenizer.get_vocab(), special])


def prompts(rows: Sequence[Sequence[int]]) -> str:
    """Return the sha256 of the token ids of all questions."""
    return checksum([list(r) for r in rows])


def images(paths: Sequence[Path]) -> str:
    """Return the sha256 of image files: the number of files and the bytes of each, in order.

    Raises:
        OSError: for a file that cannot be read.
    """

    def one(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    h = hashlib.sha256()
    with ThreadPoolExecutor(WORKERS) as pool:
        for digest in pool.map(one, paths):
            h.update(digest)
    return h.hexdigest()


def source(run: Run) -> str | None:
    """Return the sha256 of the file that defines a method outside the package; None for a method of the package."""
    cls = type(run.method)
    if cls.__module__.split(".")[0] == __name__.split(".")[0]:
        return None
    return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()


def chosen(settings: Settings, task: Task, run: Run) -> dict[str, Any]:
    """Return the settings of a run that are known without a model: the first part of `run.settings_of`."""
    return {
        "task": task.name,
        "model": settings.model,
        "model_base": settings.model_base,
        "method": run.name,
        "tokens": run.tokens,
        "hyper": json_values(run.method.hyper()),
        "method_source": source(run),
        "max_new_tokens": task.max_new_tokens,
        "limit": settings.limit,
        "seed": settings.seed,
        "conv_mode": settings.conv_mode,
    }


def of_model(loaded: Any, name: str, base: str | None) -> dict[str, Any]:
    """Return the model's part of the identity, which all benchmarks and methods share.

    Args:
        loaded: the model, see `llava_prune.load`.
        name: checkpoint folder or hub id.
        base: checkpoint that an adapter was trained on, or None.

    Raises:
        ValueError: for weights with NaN or infinite values.
    """
    parameter = next(loaded.model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    bad = not_finite(loaded.model)
    if bad:
        raise ValueError(
            f"{name}: {len(bad)} tensors have values in {dtype} that are NaN or infinite, first {bad[0]}; fetch the "
            "checkpoint again, or give another --dtype"
        )
    text = getattr(loaded.model.config, "text_config", None) or loaded.model.config
    more = [name for name, used in (("bitsandbytes", loaded.bits), ("deepspeed", loaded.engine == "deepspeed")) if used]
    return {
        "model": name,
        "model_base": base,
        "bits": loaded.bits,
        "engine": None if loaded.engine is None else f"{loaded.engine}, {processes()} processes",
        "weights": weights(loaded.model),
        "config": configs(loaded),
        "tokenizer": tokenizer(loaded.tokenizer),
        "family": loaded.family,
        "device": loaded.device.type,
        "dtype": dtype,
        "attn": getattr(text, "_attn_implementation", None),
        "versions": versions(*more),
    }
