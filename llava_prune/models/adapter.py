"""Adapters in LLaVA's format: a LoRA folder or a projector alone, with the checkpoint that it was trained on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import ORIGINAL
from .files import ADAPTER, PROJECTOR, is_adapter, read_json, refuse_integers, tensors, tensors_of

TRAINED = "non_lora_trainables.bin"
LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "merge_weights",
}  # fmt: skip
"""Entries of the adapter_config.json of a plain LoRA. An adapter with any other entry set is refused."""
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations of a LoRA that do not change the weights of the base."""


@dataclass(frozen=True)
class Source:
    """The folders of a checkpoint.

    Attributes:
        folder: the folder of the config, and of the adapter if the checkpoint is one.
        base: the checkpoint that the adapter was trained on; None for a complete checkpoint.
    """

    folder: Path
    base: Path | None = None

    @property
    def weights(self) -> Path:
        """The folder with the weights of the language model and the tokenizer."""
        return self.base or self.folder

    @property
    def folders(self) -> list[Path]:
        """The folders in which a vision tower is searched."""
        return [self.folder] if self.base is None else [self.folder, self.base]

    def extra(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of an adapter that replace those of the base: the projector, and other trained tensors.

        The low-rank updates are not among them.
        """
        if self.base is None:
            return
        for name in (PROJECTOR, TRAINED):
            if (self.folder / name).is_file():
                for key, value in _floating(self.folder / name):
                    yield _stripped(key), value

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors, with those of `extra` instead of the base's; `add_lora` adds the low-rank updates."""
        extra = dict(self.extra())
        yield from ((name, value) for name, value in tensors(self.weights) if name not in extra)
        yield from extra.items()


def _floating(file: Path) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors_of(file):
        if not value.is_floating_point():
            refuse_integers([name], file)
        yield name, value


def _stripped(name: str) -> str:
    """Return the base's name of a tensor that was trained next to a LoRA."""
    if name.startswith("base_model."):
        return name.removeprefix("base_model.").removeprefix("model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def check_base(folder: Path, base: Path | None) -> None:
    """Refuse a base for a complete checkpoint, and a base that is not a LLaVA in LLaVA's format or its language model.

    Raises:
        ValueError: if the base is refused. The message says what to give instead.
    """
    if base is None:
        return
    if not is_adapter(folder):
        raise ValueError(f"{folder} is a complete checkpoint, which needs no model_base; leave out model_base={base}")
    config = read_json(base / "config.json")
    language = ORIGINAL.get(read_json(folder / "config.json").get("model_type", ""), "llama")
    known = [language, *(kind for kind, of in ORIGINAL.items() if of == language)]
    if "text_config" in config or config.get("model_type") not in known:
        raise ValueError(
            f"model_base={base}: model_type {config.get('model_type')!r} is not supported; give the "
            f"{language.capitalize()} or LLaVA checkpoint, in LLaVA's format, that the adapter was trained on"
        )


def add_lora(model: nn.Module, source: Source, rename: Callable[[str], str] = str) -> None:
    """Add the low-rank updates of an adapter to the weights of a model, in float32.

    Args:
        model: built from the base.
        source: the checkpoint.
        rename: function that maps the name of a tensor in the base to its name in the model.

    Raises:
        ValueError: if the adapter is not a plain LoRA, or belongs to another model.

    Source: W + (alpha / r) B A of the LoRA paper; with rslora alpha / sqrt(r).
    """
    if source.base is None or not (source.folder / ADAPTER).is_file():
        return
    config = _lora_config(source.folder / ADAPTER)
    places, pairs = dict(model.named_parameters()), _pairs(source.folder)
    with torch.no_grad():
        for module, (down, up) in pairs.items():
            weight = places.get(rename(f"{module}.weight"))
            if weight is None or up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1]:
                raise ValueError(
                    f"{source.folder}: the LoRA of {module} does not fit {source.base}; give the checkpoint that it "
                    "was trained on as model_base"
                )
            update = _scale(config, module, down.shape[0], source.folder) * (up.float() @ down.float())  # (out, in)
            weight.copy_(weight.float() + update.to(weight.device))


def _lora_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    asked = [name for name, value in config.items() if value and name not in KNOWN]
    if config.get("init_lora_weights", True) not in PLAIN:
        asked.append(f"init_lora_weights {config['init_lora_weights']!r}, which changes the base,")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or asked:
        what = ", ".join(asked) or f"peft_type {config.get('peft_type')!r}, bias {config.get('bias', 'none')!r}"
        raise ValueError(
            f"{path}: {what} is not a plain LoRA, which is all that is supported; merge the adapter into its base with "
            "peft (merge_and_unload) and give the merged checkpoint"
        )
    return config


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (A, B), with shapes (r, in) and (out, r)."""
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise ValueError(f"{folder}: no adapter_model.safetensors or adapter_model.bin beside {ADAPTER}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in _floating(found[0]):
        match = LORA.fullmatch(name)
        if match is None:
            raise ValueError(f"{found[0]}: {name} is not a part of a plain LoRA, which is all that is supported")
        parts.setdefault(match[1], {})[match[2]] = value
    for module, pair in parts.items():
        if pair.keys() != {"A", "B"} or pair["A"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[-1]:
            raise ValueError(f"{found[0]}: the LoRA of {module} has no matching A and B; fetch the file again")
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def _scale(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    alpha = _of_module(config, "alpha_pattern", module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{folder / ADAPTER}: lora_alpha is {json.dumps(alpha)}; it must be a number")
    wanted = _of_module(config, "rank_pattern", module, config.get("r"))
    if wanted != rank:
        raise ValueError(f"{folder / ADAPTER}: {module} has rank {wanted!r}, the weights have {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: dict[str, Any], name: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as in peft, or the default."""
    for key, value in (config.get(name) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
