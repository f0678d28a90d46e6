"""The processes that evaluate together, as torchrun starts them, and what they say to each other.

They share a store of torch.distributed and the folder of results, nothing else: no process group, no collectives. The
first process decides what is to be done, each process claims one piece of it after another, and the first one joins
the answers.
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
"""Seconds between two looks at the store."""
FOREVER = datetime.timedelta(days=365)
"""A process that ends takes the others with it (torchrun), so nobody waits for a process that is gone."""


class Ranks:
    """The processes of an evaluation; one alone unless `of` finds more.

    Attributes:
        rank, count: number of this process, and of all.
        local, locals: the same among the processes of this machine.
        together: whether each process has a part of the model (tensor parallelism), so that all of them answer the same
            questions; otherwise each answers questions of its own.
    """

    def __init__(
        self,
        store: Store | None = None,
        rank: int = 0,
        count: int = 1,
        local: int = 0,
        locals: int = 1,
        together: bool = False,
    ) -> None:
        self._store = store or HashStore()
        self.rank, self.count, self.local, self.locals, self.together = rank, count, local, locals, together
        self._tasks = 0

    @classmethod
    def of(cls, env: Mapping[str, str], together: bool = False) -> Ranks:
        """The processes that torchrun, or a launcher with its environment variables, has started.

        Args:
            env: environment variables.
            together: see `Ranks`; the processes then have a process group, too.

        Raises:
            ValueError: when the variables are incomplete, or the store cannot be reached.
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
        rank, count, local, locals = (int(env[n]) for n in names)
        store = _fresh(store, rank, count)
        if together:
            start_group(store, rank, count, local)
        return cls(store, rank, count, local, locals, together)

    @property
    def first(self) -> bool:
        """Whether this process decides, joins and reports."""
        return self.rank == 0

    def device(self, given: str | None) -> str | None:
        """The device of this process: a GPU of its own, unless `given` is a device without numbers.

        Raises:
            ValueError: for one GPU for several processes, or more processes than GPUs.
        """
        if self.together or self.count == 1 or given == "cpu" or (given is None and not torch.cuda.is_available()):
            return given
        if given not in (None, "cuda"):
            raise ValueError(f"device={given!r}: {self.count} processes take a device each; give cuda or cpu")
        if self.local >= torch.cuda.device_count():
            raise ValueError(
                f"{self.locals} processes on a machine with {torch.cuda.device_count()} visible GPUs; start one for "
                "each GPU"
            )
        return f"cuda:{self.local}"

    def speaks(self, message: str) -> bool:
        """Whether this process is the first to fail with a message; what all of them meet is printed once."""
        return self._store.add(f"said/{message}", 1) == 1

    def task(self, name: str) -> SharedTask:
        """What the processes say to each other about one benchmark. All of them must ask for the same ones in turn."""
        self._tasks += 1
        return SharedTask(PrefixStore(f"{self._tasks}/{name}", self._store), self.rank, self.count, self.together)


def _fresh(store: Store, rank: int, count: int) -> Store:
    """A part of the store that is empty.

    torchrun keeps the store when it starts all processes again, with what the earlier ones have written.
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
            job = store.get("job").decode()  # perhaps of an earlier attempt, which nobody answers for any more
            store.set(f"{job}/{rank}", mine)
            if store.check([f"{job}/{mine}"]):
                return PrefixStore(job, store)
        time.sleep(PAUSE)


class SharedTask:
    """One benchmark that several processes evaluate. Use as a context manager: the others hear of a failure."""

    def __init__(self, store: Store, rank: int, count: int, together: bool = False) -> None:
        self._store, self.rank, self.count, self.together = store, rank, count, together
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
        """Tell the other processes what is to be done."""
        self._store.set("plan", json.dumps(plan))
        self._published = True

    def receive(self) -> Any:
        """What the first process has published.

        Raises:
            ValueError: when it failed before.
        """
        while not self._store.check(["plan"]):
            time.sleep(PAUSE)
        plan = json.loads(self._store.get("plan"))
        if "error" in plan:
            raise ValueError(plan["error"])
        return plan

    def claim(self) -> int:
        """Number of a piece: 0, 1, 2 ..., past the last when all are taken.

        No other process gets it, unless all answer the same (`Ranks.together`).
        """
        self._claimed += 1
        return self._claimed - 1 if self.together else self._store.add("claimed", 1) - 1

    def answered(self, label: str, count: int = 0) -> int:
        """Add to the number of new answers of a run; returns that of all processes."""
        return self._store.add(f"answered/{label}", count)

    def leave(self, error: str = "") -> None:
        """Say that this process has written its last answer."""
        self._left = True
        self._store.set(f"error/{self.rank}", error)
        self._store.add("left", 1)

    @property
    def others_left(self) -> bool:
        """Whether every other process has left."""
        return self._store.add("left", 0) >= self.count - 1

    def errors(self) -> list[str]:
        """What other processes failed with."""
        found = (self._store.get(f"error/{r}").decode() for r in range(1, self.count))
        return [f"process {r}: {text}" for r, text in enumerate(found, 1) if text]
