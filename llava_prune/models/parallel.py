"""Tensor parallelism: each process that torchrun starts holds a part of every layer of the language model.

Vision tower and projector are complete in every process. Scores are computed from the attention of all heads, which
`runtime.attention.all_heads` gathers, so every process keeps the same tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..runtime.attention import head_group
from ..runtime.compat import split_by_plan
from ..runtime.decoder import architecture
from .base import Family, encoder_blocks

ENGINES = ("deepspeed", "tp")


def check_engine(engine: str, others: dict[str, Any]) -> None:
    """Refuse an unknown engine, one that is not installed, or an engine together with other placement arguments.

    Args:
        engine: see `llava_prune.load`.
        others: placement arguments by name, None for those that are not given.

    Raises:
        ValueError: if the engine is refused. The message says what to change.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not known; choose {' or '.join(ENGINES)}, or leave it out")
    for name, value in others.items():
        if value not in (None, ""):
            raise ValueError(
                f"engine={engine!r} with {name}={value!r} is not supported: each process takes the GPU of its "
                "LOCAL_RANK, or the CPU; leave out one of them"
            )
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("engine='deepspeed' needs the package deepspeed (pip install deepspeed); or use engine='tp'")


def start_group(store: Any, rank: int, count: int, local: int) -> None:
    """Start the process group of processes that already share a store.

    Args:
        store: the store of torch.distributed.
        rank: rank of this process.
        count: number of processes.
        local: LOCAL_RANK of this process, which selects the GPU.

    Raises:
        ValueError: if there is no GPU for this process.
    """
    if torch.cuda.is_available():
        _take_gpu(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=count)


def _take_gpu(local: int) -> None:
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {local}, and this machine has {torch.cuda.device_count()} CUDA devices; start one "
            "process for each of them (torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local)


def join() -> torch.device:
    """Join the process group of torchrun, if this has not happened yet, and return the device of this process.

    Raises:
        ValueError: if there is no GPU for this process, or if the process group cannot be joined.
    """
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda:
        _take_gpu(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the process group cannot be joined ({error}); start the processes by torchrun"
            ) from error
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def processes() -> int:
    """Return the number of processes in the group, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def split(model: Any, family: Family, engine: str, dtype: torch.dtype) -> None:
    """Split the language model's layers and lm_head over the processes; the model is changed in place.

    Args:
        model: the complete model, on the CPU.
        family: its package.
        engine: "deepspeed" for deepspeed.init_inference without kernel injection, "tp" for transformers' `tp_plan`.
        dtype: dtype of the model.

    Raises:
        ValueError: if the heads cannot be divided among the processes, or for a language model other than Llama.
    """
    lm, world = family.language_model(model), processes()
    _refuse_untested(lm, f"engine={engine!r}", "use device_map, load_8bit or load_4bit")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(lm.config, name)
        if heads % world:
            raise ValueError(f"{name} is {heads}, which {world} processes cannot share; start a number that divides it")
    if engine == "deepspeed":
        _deepspeed(model, type(lm.layers[0]), dtype, world)
    elif world > 1:
        split_by_plan(model, world)


def _refuse_untested(lm: Any, what: str, way: str) -> None:
    """Refuse a feature that is tested with Llama's layers only; in others, biases and head norms may need a split too.

    Args:
        lm: the language model.
        what: the feature, for the error message.
        way: the alternative, for the error message.

    Raises:
        ValueError: if the language model is not a Llama.
    """
    found = architecture(lm)
    if found != "Llama":
        raise ValueError(f"{what} is tested with Llama language models only, and this one is {found}; {way}")


def _deepspeed(model: Any, layer: type, dtype: torch.dtype, world: int) -> None:
    options: dict[str, Any] = {"tensor_parallel": {"tp_size": world}, "replace_with_kernel_inject": False}
    if world > 1:
        options["injection_policy"] = {layer: ("self_attn.o_proj", "mlp.down_proj")}  # their outputs are summed
    with contextlib.redirect_stdout(sys.stderr):  # deepspeed sets up its log on import, which must not go to stdout
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() == "cpu":
            # deepspeed's own all-reduce is compiled on first use and crashes without its launcher's LOCAL_SIZE
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_inference(model, dtype=dtype, **options)


def check_split(family: Family, model: Any, accelerated: bool) -> None:
    """Refuse a model whose heads are split unevenly over processes, and acceleration of models it is not tested with.

    Args:
        family: the model's package.
        model: the model.
        accelerated: whether `graphs` or `fused` is requested.

    Raises:
        ValueError: if the model or the acceleration is refused. The message says what to change.
    """
    if accelerated:
        _refuse_untested(family.language_model(model), "acceleration (graphs, fused)", "leave them out")
    for blocks in (family.language_model(model).layers, encoder_blocks(family.encoder(model))):
        attention: Any = getattr(blocks[0], "self_attn", None) if len(blocks) else None
        group = None if attention is None else head_group(attention)
        if group is None:
            continue
        world, heads = dist.get_world_size(group), attention.config.num_attention_heads
        if heads % world:
            raise ValueError(f"{heads} heads are split over {world} processes; start a number that divides them")
        if accelerated:
            raise ValueError(
                "graphs and fused are not supported on a model that is split over processes; leave them out"
            )


def gather_tensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Gather a tensor of the complete model from the parts of all processes. Every process must call this.

    Args:
        model: a model that is split by either engine, or not split.
        name: name of the tensor.
        tensor: the part of this process.
    """
    if hasattr(tensor, "full_tensor"):
        full: Tensor = tensor.full_tensor()
        return full
    if processes() == 1:
        return tensor
    module = model.get_submodule(name.rpartition(".")[0])
    group, by_rows = getattr(module, "mp_group", None), type(module).__name__ == "LinearLayer"
    if group is None or not (by_rows or name.endswith("weight")):
        return tensor
    dim, world = 0 if by_rows else 1, dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(world)]
    dist.all_gather(sizes, torch.full_like(sizes[0], tensor.shape[dim]), group=group)
    widths = torch.cat(sizes).tolist()  # lm_head is divided in units of 64 columns, so widths may differ
    padded = tensor.new_zeros([max(widths) if d == dim else n for d, n in enumerate(tensor.shape)])
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, widths, strict=True)], dim)


def smallest(value: int) -> int:
    """Return the minimum of a value over all processes."""
    if processes() == 1:
        return value
    cuda = dist.get_backend() == "nccl"
    box = torch.tensor(value, device=torch.device("cuda", torch.cuda.current_device()) if cuda else None)
    dist.all_reduce(box, op=dist.ReduceOp.MIN)
    return int(box)
