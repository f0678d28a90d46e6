"""Start one evaluation process for each GPU with torchrun's agent (torch.distributed.elastic)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_count(gpus: int | None, procs: int | None, alone: bool) -> int:
    """Return the number of processes to start.

    Args:
        gpus: GPUS, the number of processes with a GPU each; None for all visible GPUs.
        procs: PROCS, the number of processes on the CPU.
        alone: whether the settings place the model on a device, so that one process is the default.

    Raises:
        ValueError: if both numbers are given, or for more GPUs than are visible.
    """
    if gpus is not None and procs is not None:
        raise ValueError(f"GPUS={gpus} and PROCS={procs}: give GPUS for GPUs or PROCS for the CPU")
    visible = torch.cuda.device_count()
    if gpus is not None and gpus > visible:
        raise ValueError(f"GPUS={gpus}: {visible} GPUs are visible here; give {visible or 'PROCS for the CPU'}")
    return gpus or procs or (1 if alone else max(1, visible))


def launch(count: int, argv: Sequence[str], restarts: int) -> int:
    """Run `llava-prune` in several processes on this machine and wait for them.

    Args:
        count: number of processes.
        argv: arguments of the command.
        restarts: how often all processes are started again when one of them fails.

    Returns:
        The exit status. A process that fails prints its message itself.

    Raises:
        ValueError: naming the process, if a signal ended it.
        KeyboardInterrupt: if this process is interrupted.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's warnings contain C++ stack traces
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the agent reports on every process
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "llava_prune", *argv)
        except SignalException as error:
            raise KeyboardInterrupt from error
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return 1
            name = signal.Signals(-failure.exitcode).name
            raise ValueError(
                f"process {rank} of {count} was ended by {name}; its answers so far are kept, run the same command to "
                "resume (--max-restarts starts the processes again at once)"
            ) from error
    return 0
