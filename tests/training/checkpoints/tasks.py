"""What the tests of checkpoints have run on several processes; each gets its rank first."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from training import small
from training.distributed.tasks import parallel, whole

from fastattn.training import Checkpoints, History, TrainingConfig
from fastattn.training.distributed.processes import losses_named
from fastattn.training.distributed.tensor import canonical

CONFIG: TrainingConfig = small.with_changes(
    steps=6, batch_size=2, accumulation=4, evaluation_interval=100, ema_decay=0.8
)
SHARDED: dict[str, Any] = {"shard": 2}
COPIES: dict[str, Any] = {"replicate": 2}
DIVIDED: dict[str, Any] = {"tensor": 2}  # whose checkpoints have the rows in one process' order


@dataclass
class Result:
    """What a run left: its weights, whole; its record; where it went on from; what it warned of."""

    weights: dict[str, torch.Tensor]
    history: History
    start: int
    warned: list[str]


class Stopped(Exception):
    """Raised on all ranks at one step, as if the machine were turned off."""


def run(
    folder: Path,
    numbers: dict[str, Any],
    stop: int | None = None,
    batches: int = 4,
    dropout: float = 0.1,
) -> Result:
    """A run with a checkpoint every two steps, or only its first `stop` steps.

    `batches` are read in a step.
    """
    subject = small.model(dropout=dropout)
    seen: list[int] = []

    def progress(history: History) -> None:
        seen.append(len(history.steps))
        if len(history.steps) == stop:
            raise Stopped

    history = History()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(Stopped):
            history = small.trained(
                subject, dataclasses.replace(CONFIG, accumulation=batches), validation=None,
                parallel=parallel(**numbers), on_progress=progress,
                checkpoints=Checkpoints(folder, every_steps=2, keep=9),
            )  # fmt: skip
    weights = {
        name: whole(canonical(subject, name, value)) for name, value in subject.state_dict().items()
    }
    told = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
    return Result(weights, history, seen[0] if seen[0] != 1 else 0, told)


def one(rank: int, *args: Any) -> Result:
    return run(*args)


def two(rank: int, folder: Path) -> dict[str, Result]:
    """Runs of two processes: whole, and gone on with, by whatever wrote the checkpoint.

    "alone" is there, by one process.
    """
    results = {"whole": run(folder / "whole", SHARDED)}
    run(folder / "parted", SHARDED, 5)
    copied(rank, folder / "parted", "again", "copies", "damaged", "one")
    if rank == 0:
        (file,) = (folder / "damaged" / "step-000004").glob("shard-00002-*")
        file.unlink()
    results["again"] = run(folder / "again", SHARDED)
    results["copies"] = run(folder / "copies", COPIES)
    results["damaged"] = run(folder / "damaged", SHARDED)
    results["alone"] = run(folder / "alone", SHARDED)
    # Without dropout, of which tensor parallelism has other masks.
    run(folder / "divided", DIVIDED, 5, dropout=0.0)
    copied(rank, folder / "divided", "joined", "divided again", "divided otherwise")
    results["divided again"] = run(folder / "divided again", DIVIDED, dropout=0.0)
    results["divided otherwise"] = run(folder / "divided otherwise", SHARDED, dropout=0.0)
    results["divided"] = run(folder / "divided whole", DIVIDED, dropout=0.0)
    return results


def copied(rank: int, folder: Path, *names: str) -> None:
    """Copies of a folder beside it, for all ranks."""
    if rank == 0:
        for name in names:
            shutil.copytree(folder, folder.with_name(name))
    torch.distributed.barrier()


def at_write(rank: int, victim: int, number: int, action: Callable[[], None]) -> None:
    """Have `action` come before the `number`th time, from 0, that the victim writes its part."""
    if rank != victim:
        return
    count, save = itertools.count(), safetensors.torch.save

    def acting(*args: Any, **how: Any) -> bytes:
        if next(count) == number:
            action()
        return save(*args, **how)

    safetensors.torch.save = acting


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unwritten(rank: int, folder: Path) -> str:
    """The error of a run in which rank 1 cannot write the second checkpoint."""
    at_write(rank, 1, 1, full)
    try:
        run(folder, SHARDED)
    except OSError as error:
        return str(error)
    return "no error"


def lost(rank: int, folder: Path) -> None:
    """A run whose rank 1 is killed while it writes the second checkpoint."""
    at_write(rank, 1, 1, killed)
    with losses_named():
        run(folder, SHARDED)


def apart(rank: int, folder: Path) -> str:
    """The error of a run whose processes see folders of their own."""
    try:
        run(folder / str(rank), SHARDED)
    except RuntimeError as error:
        return str(error)
    return "no error"
