"""What the tests of checkpoints have run on several processes; each gets its rank first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from training import small
from training.distributed.tasks import parallel

from fastattn.training import Checkpoints, History, TrainingConfig

STEPS = 6
CONFIG: TrainingConfig = small.with_changes(
    steps=STEPS, accumulation=4, batch_size=2, evaluation_interval=100, ema_decay=0.8
)


class Stopped(Exception):
    """Raised on all ranks, as by a machine that is turned off."""


def run(
    rank: int,
    folder: Path,
    numbers: dict[str, Any],
    stop: int | None = None,
    trouble: Callable[[int], None] | None = None,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], list[tuple[float, int]], int, list[str]]:
    """A run with a checkpoint every two steps, or its first `stop` steps.

    Returns its weights, loss and tokens of each step, the step that it went on from, warnings.
    """
    if trouble is not None:
        trouble(rank)
    subject = small.model(seed=rank if changes.pop("differs", False) else 0, dropout=0.1)
    config = small.dataclasses.replace(CONFIG, **changes)
    seen: list[int] = []

    def progress(history: History) -> None:
        seen.append(len(history.steps))
        if stop is not None and len(history.steps) == stop:
            raise Stopped

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            history = small.trained(
                subject, config, validation=None, parallel=parallel(**numbers),
                checkpoints=Checkpoints(folder, every_steps=2, keep=9), on_progress=progress,
            )  # fmt: skip
        except Stopped:
            return {}, [], 0, []
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in subject.state_dict().items()
    }
    told = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
    steps = [(step.loss, step.tokens) for step in history.steps]
    return weights, steps, seen[0] if seen[0] > 1 else 0, told
