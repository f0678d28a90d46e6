"""The processes of an evaluation, as torchrun starts them, and their communication.

They share a torch.distributed store and the folder of results, but no process group and no collectives (except for
`tensor_parallel`). The first process publishes the work, each process claims one piece of it after another, and the
first process joins the answers.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, Store

from ..models.parallel import start_group

PAUSE = 0.05
"""Seconds between two polls of the store."""
FOREVER = datetime.timedelta(days=365)
"""Timeout of the store. torchrun ends all processes when one of them ends, so no process waits for one that is gone."""


class Ranks:
    """The processes of an evaluation: a single one unless `of` finds more.

    Attributes:
        rank, count: rank of this process, and the number of processes.
        local_rank, local_count: the same among the processes of this machine.
        tensor_parallel: whether each process holds a part of the model, so that all of them answer the same questions;
            otherwise each process answers different questions.
    """

    def __init__(
        self,
        store: Store | None = None,
        rank: int = 0,
        count: int = 1,
        local_rank: int = 0,
        local_count: int = 1,
        tensor_parallel: bool = False,
    ) -> None:
        self._store = store or HashStore()
        self.rank, self.count, self.local_rank, self.local_count = rank, count, local_rank, local_count
        self.tensor_parallel = tensor_parallel
        self._tasks = 0

    @classmethod
    def of(cls, env: Mapping[str, str], tensor_parallel: bool = False) -> Ranks:
        """Return the processes that torchrun, or a launcher with its environment variables, has started.

        Args:
            env: environment variables.
            tensor_parallel: see `Ranks`; a process group is created as well.

        Raises:
            ValueError: if the variables are incomplete, or the store cannot be reached.
        """
        if int(env.get("WORLD_SIZE", "1")) == 1 or "RANK" not in env:
            return cls()
        from torch.distributed.rendezvous import rendezvous

        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [n for n in (*names, "MASTER_ADDR", "MASTER_PORT") if n not in env]
        if missing:
            raise ValueError(f"{', '.join(missing)} not set, RANK is; start the processes with torchrun")
        try:
            store, *_ = next(iter(rendezvous("env://", timeout=FOREVER)))
        except RuntimeError as error:
            raise ValueError(f"the other processes cannot be reached ({str(error).splitlines()[0]})") from error
        rank, count, local_rank, local_count = (int(env[n]) for n in names)
        store = _fresh(store, rank, count)
        if tensor_parallel:
            start_group(store, rank, count, local_rank)
        return cls(store, rank, count, local_rank, local_count, tensor_parallel)

    @property
    def first(self) -> bool:
        """Whether this is the first process, which publishes the work, joins the answers and reports."""
        return self.rank == 0

    def device(self, given: str | None) -> str | None:
        """Return the device of this process: a GPU of its own if there are several processes, else `given`.

        All processes keep `given` on a CPU and with `tensor_parallel`.

        Raises:
            ValueError: if several processes would share a GPU.
        """
        single = self.tensor_parallel or self.count == 1
        if single or given == "cpu" or (given is None and not torch.cuda.is_available()):
            return given
        if given not in (None, "cuda"):
            raise ValueError(f"device={given!r}: {self.count} processes take a device each; give cuda or cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{self.local_count} processes on a machine with {torch.cuda.device_count()} visible GPUs; start one "
                "for each GPU"
            )
        return f"cuda:{self.local_rank}"

    def first_to_report(self, message: str) -> bool:
        """Return whether this process is the first to fail with a message, so that a shared error is printed once."""
        return self._store.add(f"said/{message}", 1) == 1

    def task(self, name: str) -> SharedTask:
        """Return the shared state of a benchmark; all processes must ask for the same benchmarks in the same order."""
        self._tasks += 1
        store = PrefixStore(f"{self._tasks}/{name}", self._store)
        return SharedTask(store, self.rank, self.count, self.tensor_parallel)


def _fresh(store: Store, rank: int, count: int) -> Store:
    """Agree on an empty part of the store.

    torchrun keeps the store when it restarts all processes, together with the entries of the earlier attempt.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("job", mine)
        for other in range(1, count):
            while not store.check([f"{mine}/{other}"]):
                time.sleep(PAUSE)
            store.set(f"{mine}/{store.get(f'{mine}/{other}').decode()}", "")
        return PrefixStore(mine, store)
    while True:
        if store.check(["job"]):
            job = store.get("job").decode()  # may belong to an earlier attempt, whose first process never answers
            store.set(f"{job}/{rank}", mine)
            if store.check([f"{job}/{mine}"]):
                return PrefixStore(job, store)
        time.sleep(PAUSE)


class SharedTask:
    """One benchmark that several processes evaluate; a context manager that tells the others about a failure."""

    def __init__(self, store: Store, rank: int, count: int, tensor_parallel: bool = False) -> None:
        self._store, self.rank, self.count, self.tensor_parallel = store, rank, count, tensor_parallel
        self._left = self._published = False
        self._claimed = 0

    @property
    def first(self) -> bool:
        """See `Ranks.first`."""
        return self.rank == 0

    def __enter__(self) -> SharedTask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ValueError) and self.first and not self._published:
            self.publish({"error": str(error)})
        elif isinstance(error, ValueError) and not self.first and not self._left:
            self.leave(str(error))

    def publish(self, plan: Mapping[str, Any]) -> None:
        """Send the plan of the work to the other processes."""
        self._store.set("plan", json.dumps(plan))
        self._published = True

    def receive(self) -> Any:
        """Wait for the plan of the first process and return it.

        Raises:
            ValueError: if the first process failed, with its message.
        """
        while not self._store.check(["plan"]):
            time.sleep(PAUSE)
        plan = json.loads(self._store.get("plan"))
        if "error" in plan:
            raise ValueError(plan["error"])
        return plan

    def claim(self) -> int:
        """Claim a piece and return its number: 0, 1, 2, ..., then numbers past the last piece.

        No other process gets the same number, unless all answer the same questions (`Ranks.tensor_parallel`).
        """
        self._claimed += 1
        return self._claimed - 1 if self.tensor_parallel else self._store.add("claimed", 1) - 1

    def answered(self, label: str, count: int = 0) -> int:
        """Add to the number of new answers of a run and return the total of all processes."""
        return self._store.add(f"answered/{label}", count)

    def leave(self, error: str = "") -> None:
        """Announce that this process has written its last answer."""
        self._left = True
        self._store.set(f"error/{self.rank}", error)
        self._store.add("left", 1)

    @property
    def others_left(self) -> bool:
        """Whether every other process has left."""
        return self._store.add("left", 0) >= self.count - 1

    def errors(self) -> list[str]:
        """Return the error messages of the other processes."""
        found = (self._store.get(f"error/{r}").decode() for r in range(1, self.count))
        return [f"process {r}: {text}" for r, text in enumerate(found, 1) if text]
