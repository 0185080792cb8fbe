"""The processes of a run: those that torchrun has started, or this one.

    with joined("auto") as processes:
        processes.lead_first(prepare)       # rank 0, then the others, which find it made
        processes.together(train)           # an error on one is an error on all

NCCL carries the tensors of GPUs, gloo those of CPUs, and everything here besides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastattn.training.distributed.heartbeat import Heartbeat
from fastattn.training.distributed.layout import DistributedConfig

T = TypeVar("T")

JOIN_SECONDS = 50.0  # for all processes to be there
LEAD_DAYS = 7.0  # that the data may take to prepare


class LostProcessError(RuntimeError):
    """Another process of the run ended, or does not answer."""


class Processes:
    """This process among those of its run.

    Attributes:
        rank, count: its number, and how many there are.
        device: the one that `joined` was asked for; of several GPUs this process's.
        control: the group, of gloo, in which they agree; of this object. None for one process.
    """

    def __init__(
        self,
        device: str,
        patience: timedelta = timedelta(days=LEAD_DAYS),
        heart: Heartbeat | None = None,
    ) -> None:
        """
        Args:
            patience: how long the others may take, if they live, before they count as lost.
            heart: what says that they live, where `joined` has started it.
        """
        self.device = device
        self._heart = heart
        self.rank, self.count = 0, 1
        self.control: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            if self.count > 1:
                # Of its own: a step's time is too short for what `lead_first` waits for.
                self.control = dist.new_group(backend="gloo", timeout=patience)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def patient(self, size: int) -> contextlib.AbstractContextManager[None]:
        """For work that copies `size` bytes under Python's lock, with no sign of life meanwhile."""
        return contextlib.nullcontext() if self._heart is None else self._heart.patient(size)

    def gathered(self, value: T) -> list[T]:
        """Each process's `value`, by rank. All must call it."""
        values: list[Any] = [value]
        if self.count > 1:
            values = [None] * self.count
            with losses_named():
                dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this process, where it succeeds on all of them.

        Raises:
            Exception: of `work` here.
            RuntimeError: `work` raised on another rank only; the message has its number and its
                words.
        """
        trouble: Exception | None = None
        try:
            result = work()
        except LostProcessError:
            raise  # there is nobody to tell
        except Exception as error:
            trouble = error
        said = self.gathered(None if trouble is None else str(trouble) or type(trouble).__name__)
        if trouble is not None:
            raise trouble
        for rank, message in enumerate(said):
            if message is not None:
                raise RuntimeError(f"rank {rank} of {self.count}: {message}")
        return result

    def lead_first(self, work: Callable[[], T]) -> T:
        """The result of `work` on this process, which rank 0 does before the others.

        So whatever it leaves in files is made once.

        Raises:
            Exception: of `work` here; else as `together`.
        """
        if self.leads:
            result = self.together(work)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(work)


@contextlib.contextmanager
def joined(device: str, config: DistributedConfig | None = None) -> Iterator[Processes]:
    """The run's processes, for the block: this one only, unless torchrun has started several.

    A process group that is there already is used, and left as it is. Another one ends this process
    where one of the others gives no sign of life (`heartbeat`).

    Args:
        device: "auto", "cpu" or "cuda", as [model] has it; each process takes one GPU of its own.
        config: of it, how long a process may be silent, and be waited for in a step.

    Raises:
        LostProcessError: some processes did not come within a minute; the message has their ranks.
        RuntimeError: the port for their meeting is taken.
        ValueError: a machine has more processes than GPUs, or one GPU was named for all.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several or dist.is_initialized():
        yield Processes(device)
        return
    device = _own_device(device)
    config = config or DistributedConfig()
    store, rank, count = _met()
    clean, heart = False, Heartbeat(store, rank, count, config.lost_seconds)
    try:
        dist.init_process_group(
            # The one choice between GPUs and CPUs: tensors on a CPU go through gloo on both.
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=timedelta(minutes=config.step_minutes),
        )
        with losses_named():
            yield Processes(device, heart=heart)
        clean = True
    finally:
        heart.stop(clean)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Say of an error of the process group what it means.

    Raises:
        LostProcessError: in place of what the backend raises where a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of errors of its own.
        words = str(error).lower()
        ours = isinstance(error, LostProcessError)
        lost = isinstance(error, dist.DistError) or any(
            sign in words for sign in ("gloo", "nccl", "connection closed by peer", "timed out")
        )
        if ours or not lost:
            raise
        raise LostProcessError(
            f"another process of this run has ended or does not answer ({_first_line(error)}): "
            "its own message says why; the same command goes on from the last checkpoint"
        ) from error


def _own_device(device: str) -> str:
    """Of `device` the one of this process."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(f'device {device!r} is one for all processes: write "cuda"')
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            f"start torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _met() -> tuple[Store, int, int]:
    """The store, rank and count of processes that have all come to it."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    wait = timedelta(seconds=JOIN_SECONDS)
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=wait)))
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the processes cannot meet at {address} ({_first_line(error)}): start them by "
            "torchrun --standalone, or give a MASTER_PORT that is free"
        ) from error
    # After a restart by torchrun's agent the store is the same.
    store = PrefixStore(f"run {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"here {rank}", "yes")
    missing = [other for other in range(count) if not _came(store, other, wait)]
    if missing:
        raise LostProcessError(
            f"rank {', '.join(map(str, missing))} of {count} did not come to {address} within "
            f"{JOIN_SECONDS:.0f} s: look at its own message"
        )
    return store, rank, count


def _came(store: Store, rank: int, wait: timedelta) -> bool:
    try:
        store.wait([f"here {rank}"], wait)
    except dist.DistStoreError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
