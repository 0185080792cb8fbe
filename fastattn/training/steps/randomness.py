"""Random numbers of a batch: they follow from the run's seed and its number, and nothing else."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


def seed_batch(seed: int, number: int, place: int = 0) -> None:
    """Seed the generators of torch (all devices), Python and numpy for one batch.

    So a run that goes on after a crash draws what it would have drawn, whichever process has the
    batch, and neither an evaluation nor a callback in between changes that. `place` is of processes
    that have different parts of a batch's sequences.
    """
    drawn = numpy.random.SeedSequence((seed % 2**64, number, place)).generate_state(3, numpy.uint32)
    torch.manual_seed(int(drawn[0]))
    random.seed(int(drawn[1]))
    numpy.random.seed(int(drawn[2]))


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the generators that `seed_batch` seeds are as they were before."""
    python, legacy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)
