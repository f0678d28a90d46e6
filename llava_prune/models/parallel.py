"""Tensor parallelism: the processes that torchrun starts hold a part of every layer of the language model each.

Vision tower and projector are whole in every process. Scores are computed from the attention of all heads, which
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
    """Refuse an unknown engine, one that is not installed, or other ways of placing the model beside it.

    Args:
        engine: see `llava_prune.load`.
        others: those ways by argument name, None where they are not asked for.

    Raises:
        ValueError: with the way out.
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
    """Start the process group of processes that share a store already.

    Raises:
        ValueError: when there is no GPU for this process.
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
    """Join the processes that torchrun started, unless that has happened; the device of this one.

    Raises:
        ValueError: when there is no GPU for this process, or the others are not found.
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
    """Number of processes in the group, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def split(model: Any, family: Family, engine: str, dtype: torch.dtype) -> None:
    """Leave this process its part of the language model's layers and of the head; changed in place.

    Args:
        model: whole, on the CPU.
        family: its package.
        engine: "deepspeed" for deepspeed.init_inference without kernel injection, "tp" for transformers' `tp_plan`.
        dtype: of the model.

    Raises:
        ValueError: when the heads cannot be divided among the processes, and for other language models than Llama's.
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
    """Refuse what only Llama's layers were tested with: biases and norms of heads may have to be split, too."""
    found = architecture(lm)
    if found != "Llama":
        raise ValueError(f"{what} is tested with Llama language models only, and this one is {found}; {way}")


def _deepspeed(model: Any, layer: type, dtype: torch.dtype, world: int) -> None:
    options: dict[str, Any] = {"tensor_parallel": {"tp_size": world}, "replace_with_kernel_inject": False}
    if world > 1:
        options["injection_policy"] = {layer: ("self_attn.o_proj", "mlp.down_proj")}  # their outputs are summed
    with contextlib.redirect_stdout(sys.stderr):  # where its log goes, which is set up on import
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() == "cpu":
            # its own all-reduce is compiled on first use, and crashes without the LOCAL_SIZE of its own launcher
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_inference(model, dtype=dtype, **options)


def check_split(family: Family, model: Any, accelerated: bool) -> None:
    """Refuse a model whose heads are split unevenly over processes, and acceleration where it was not tested.

    Raises:
        ValueError: with the way out.
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


def whole(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the whole model from this process' part of it. Every process must call it.

    Args:
        model: of either engine, or any other.
        name: of the tensor.
        tensor: what this process has.
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
    widths = torch.cat(sizes).tolist()  # the head is divided by 64 columns
    padded = tensor.new_zeros([max(widths) if d == dim else n for d, n in enumerate(tensor.shape)])
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, widths, strict=True)], dim)


def smallest(value: int) -> int:
    """The smallest of a value over all processes."""
    if processes() == 1:
        return value
    cuda = dist.get_backend() == "nccl"
    box = torch.tensor(value, device=torch.device("cuda", torch.cuda.current_device()) if cuda else None)
    dist.all_reduce(box, op=dist.ReduceOp.MIN)
    return int(box)
