"""Placement of models that are larger than a GPU: accelerate's device maps, and 8-bit or 4-bit weights."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.patching import execution_device
from .base import Family
from .config import pick_device

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names of device maps, as in transformers; "auto" is "balanced"."""
SHARE = 0.9
"""Share of a GPU's free memory that weights may take; the rest is left for activations and the KV cache."""
BITS = {"8bit": "load_8bit", "4bit": "load_4bit"}

DeviceMap = str | Mapping[str, Any]


# arguments --------------------------------------------------------------------------------------------------------


def pick_map(device_map: Any, device: Any) -> torch.device:
    """Return the first device on which a model with this device map computes; its dtype depends on it.

    Raises:
        ValueError: for an unknown map, a device that does not exist, if `device` is given too, or if accelerate is not
            installed.
    """
    if device not in (None, ""):
        raise ValueError(f"device={str(device)!r} and device_map go against each other; give one of them")
    if isinstance(device_map, str):
        if device_map not in MAPS:
            raise ValueError(
                f"device_map={device_map!r} is not known; choose {', '.join(MAPS)}, or give a dict of module and device"
            )
        values: list[Any] = [None]
    elif isinstance(device_map, Mapping) and device_map:
        values = [v for v in device_map.values() if v not in ("disk", "cpu")]
    else:
        raise ValueError(f"device_map={device_map!r} must be a name or a dict of module and device")
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("device_map needs the package accelerate (pip install accelerate)")
    found = [pick_device(v) for v in values]
    return found[0] if found else torch.device("cpu")


def pick_bits(load_8bit: bool, load_4bit: bool, attended: Mapping[str, Any]) -> str | None:
    """Return "8bit" or "4bit", or None for weights that are not quantised.

    Args:
        load_8bit, load_4bit: see `llava_prune.load`.
        attended: placement arguments by name, None for those that are not given.

    Raises:
        ValueError: for both at once, together with another placement argument, or if bitsandbytes is not installed.
    """
    if not (load_8bit or load_4bit):
        return None
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit go against each other; give one of them")
    bits = "8bit" if load_8bit else "4bit"
    for name, value in attended.items():
        if value is not None:
            raise ValueError(f"{BITS[bits]} with {name}={value!r} is not supported; leave out one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{BITS[bits]} needs the package bitsandbytes (pip install 'bitsandbytes>=0.50')")
    return bits


# device maps ------------------------------------------------------------------------------------------------------


def dispatch(model: Any, family: Family, device_map: DeviceMap, max_memory: Any = None) -> None:
    """Spread a model over devices, CPU memory and disk; it is changed in place.

    Decoder layers and the vision tower are not split. Weights on disk are in a temporary folder (TMPDIR), which is
    removed with the model.

    Args:
        model: the model, on the CPU.
        family: its package.
        device_map: see `llava_prune.load`.
        max_memory: device -> bytes, or a size such as "10GiB", that weights may take; None for `SHARE` of the free
            memory.

    Raises:
        ValueError: for a map that does not cover the model, or contains a module that the model does not have.
    """
    from accelerate import dispatch_model

    tower = type(family.tower(model)).__name__
    whole = [type(family.language_model(model).layers[0]).__name__, tower]
    found = _computed(model, device_map, max_memory, whole) if isinstance(device_map, str) else dict(device_map)
    _check_map(model, found)
    found = {n: d for name, child in model.named_children() for n, d in _disjoint(child, name, found).items()}
    folder = None
    if "disk" in found.values():
        folder = tempfile.mkdtemp(prefix="llava-prune-")
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    # the tower's class reads the device of its own weights, so an offloaded tower is loaded as a whole
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys do not match")  # keys of single parameters
        dispatch_model(model, found, offload_dir=folder, preload_module_classes=[tower])
    for name, parameter in model.named_parameters():
        if name in found:  # accelerate places only modules, not single parameters
            parameter.data = parameter.data.to(execution_device(model, parameter.device))
    if family.name == "llava" and model.get_input_embeddings().weight.is_meta:
        raise ValueError(
            "package llava needs the device of the input embeddings, and device_map has them on disk or beside the "
            "GPU; put model.embed_tokens on the GPU, or use family='hf'"
        )


def _computed(model: Any, name: str, max_memory: Any, whole: list[str]) -> dict[str, Any]:
    """Return module -> device by free memory, as transformers does for this name; classes in `whole` are not split."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    limit = max_memory
    if name != "sequential":
        low = name == "balanced_low_0"
        limit = get_balanced_memory(model, limit, no_split_module_classes=whole, low_zero=low)
    limit = get_max_memory(limit)
    if max_memory is None:
        limit = {k: v if k in ("cpu", "disk") else int(SHARE * v) for k, v in limit.items()}
    found: dict[str, Any] = infer_auto_device_map(model, limit, no_split_module_classes=whole)
    return found


def _check_map(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Refuse a map with names that the model does not have, or that does not cover all parameters."""
    known = {"", *(n for n, _ in model.named_modules()), *(n for n, _ in model.named_parameters())}
    known |= {n for n, _ in model.named_buffers()}
    strange = [name for name in found if name not in known]
    if strange:
        raise ValueError(f"device_map: this model has no module {strange[0]!r}; print(model) shows their names")
    places = tuple(f"{name}." if name else "" for name in found)
    left = [n for n, _ in model.named_parameters() if n not in found and not n.startswith(places)]
    if left:
        raise ValueError(f"device_map has no device for {left[0]}; add its module, or '' for all that is left")


def _disjoint(module: nn.Module, name: str, found: Mapping[str, Any], above: Any = None) -> dict[str, Any]:
    """Return the part of a map below a module with disjoint names; for nested names in the map, the longest counts."""
    here = found.get(name, found.get("") if above is None else above)
    if not any(key.startswith(f"{name}.") for key in found):
        return {name: here}
    own = [f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)]
    out = {key: found.get(key, here) for key in own}
    for n, child in module.named_children():
        out |= _disjoint(child, f"{name}.{n}", found, here)
    return out


def devices(model: Any) -> list[torch.device]:
    """Return the devices on which the modules of a model compute; the first one takes the inputs."""
    first = execution_device(model, torch.device("cpu"))
    found = [execution_device(m, first) for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    return list(dict.fromkeys([first, *found]))


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all parameters and buffers by name, including those that accelerate has offloaded.

    For quantised weights, the scales are included. Offloaded tensors are read one at a time.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):  # state_dict also undoes the layout for the CPU
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for name in sorted(tensors):
        yield name, _offloaded(model, name) if tensors[name].is_meta else tensors[name]


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """Return the values of a tensor on the meta device from accelerate's hook of the module that holds it."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        hook = model.get_submodule(".".join(parts[:i])).__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            table = getattr(one, "weights_map", None)
            if table is not None:
                found: Tensor = table[".".join(parts[i:])]
                return found
    raise ValueError(f"{name} has no values (it is on the meta device); load the model again")


# 8 and 4 bit ------------------------------------------------------------------------------------------------------


def quantise(model: Any, family: Family, bits: str, device: torch.device) -> None:
    """Replace the linear layers of language model and projector by bitsandbytes' layers on a device, one by one.

    lm_head and the vision tower are not quantised. 8 bit is LLM.int8() with the outlier threshold 6; 4 bit is nf4 with
    double quantisation, computed in the model's dtype.

    Source: the same layers as load_8bit and load_4bit of haotian-liu/LLaVA's builder.py.
    """
    tower = set(family.tower(model).modules())  # in package llava, the tower is inside the language model
    for part in (family.language_model(model), family.projector(model)):
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child not in tower:
                    setattr(module, name, _quantised(child, bits).to(device))


def _quantised(linear: nn.Linear, bits: str) -> Any:
    """Return bitsandbytes' layer for a linear layer; its weights are quantised when it is moved to a device."""
    import bitsandbytes as bnb

    made: Any = None
    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    with torch.device("meta"):
        if bits == "8bit":
            made = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False, threshold=6.0)
        else:
            made = bnb.nn.Linear4bit(
                *size, bias=bias, compute_dtype=linear.weight.dtype, compress_statistics=True, quant_type="nf4"
            )
    if bits == "8bit":
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
        )
    made.bias = linear.bias
    return made.requires_grad_(False)


# errors -----------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or the host is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
