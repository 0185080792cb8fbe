"""A transformers model beside its accelerated copy: what was swapped, and who is how fast."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import fastattn

LEAST_ROUNDS = 3

Works = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Comparison:
    """Measurements of one model.

    Attributes:
        swapped: how many modules of which class run on fastattn.
        seconds: the median of each work, by what ran it: "original", "accelerated", ...
    """

    model: str
    dtype: str
    device: str
    swapped: dict[str, int]
    same_tokens: bool
    seconds: dict[str, dict[str, float]]


def line(name: str, text: str) -> None:
    """Print a line of the demo."""
    print(f"   {name:<11} {text}", flush=True)


def accelerated(original: torch.nn.Module) -> tuple[Any, dict[str, int]]:
    """An accelerated copy of `original`, and how many modules of which class were swapped."""
    model = copy.deepcopy(original)
    report = fastattn.accelerate(model)
    swapped = Counter(entry.class_name for entry in report.swapped)
    line("swapped", _counted(swapped) or "nothing: nothing here gains on this device")
    line("left alone", _counted(Counter(entry.class_name for entry in report.left)))
    return model, dict(swapped)


def _counted(classes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in classes.items())


def interleaved(works: Works, device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, interleaved, every second round in the opposite order.

    Rounds go on for `seconds`, at least `LEAST_ROUNDS`, so that the median leaves out a slow first
    call.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in works}
    end, rounds = clock() + seconds, 0
    while rounds < LEAST_ROUNDS or clock() < end:
        for name in works if rounds % 2 == 0 else reversed(list(works)):
            start = clock()
            works[name]()
            times[name].append(clock() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}
