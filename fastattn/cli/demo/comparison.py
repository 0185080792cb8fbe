"""A transformers model beside its accelerated copy: what was swapped, and who is how fast."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import fastattn
from fastattn.timing import Candidate, interleave

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


def medians(works: Works, device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, interleaved: for about `seconds`, 3 to 25 rounds.

    There is no warm-up; the median leaves out a slow first call.
    """
    candidates = [Candidate(name, work) for name, work in works.items()]
    # The clock is the current device's.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        samples = interleave(
            candidates, device=device.type, rounds=25, warm_up_batches=0, seconds=seconds
        )
    return {name: sample.median for name, sample in samples.items()}
