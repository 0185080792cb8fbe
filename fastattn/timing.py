"""Interleaved timing: every candidate runs once a round, so that drift hits all alike.

The clock is `timeit` on the CPU (garbage collection off) and a pair of CUDA events around a batch
of launches on a GPU. One value a round is kept for each candidate. Compared are the ratios (or
differences) of two candidates inside a round: their median and their spread over the rounds.
(torch.utils.benchmark.Timer makes two uncounted calls before each value, which would triple a
training step, and triton.testing.do_bench times one function at a time.)
"""

from __future__ import annotations

import itertools
import math
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch

SETTLED = 0.1  # a warm-up ends when a batch takes no less than this share under the one before
WARM_UP_BATCHES = 20  # or after so many


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some values."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        percentiles: list[float] = numpy.percentile(list(values), [20, 50, 80]).tolist()
        p20, median, p80 = percentiles
        return cls(median, p20, p80)

    def as_dict(self, scale: float = 1.0, suffix: str = "") -> dict[str, float]:
        return {
            f"median{suffix}": self.median * scale,
            f"p20{suffix}": self.p20 * scale,
            f"p80{suffix}": self.p80 * scale,
        }


@dataclass(frozen=True)
class Sample:
    """Times of one candidate: seconds per call, one value a round of `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    @property
    def median(self) -> float:
        return self.spread.median

    def as_dict(self) -> dict[str, Any]:
        """Microseconds: `median_us`, `p20_us`, `p80_us`, and how many `rounds` and `calls`."""
        rounds = {"rounds": len(self.seconds), "calls": self.calls}
        return self.spread.as_dict(1e6, "_us") | rounds


@dataclass(frozen=True)
class Candidate:
    """Something to time. `context` is entered around a whole batch, so its cost is not counted."""

    name: str
    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def ratio(numerator: Sample, denominator: Sample) -> Spread:
    """The spread of numerator/denominator, round by round."""
    return Spread.of(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))


def difference(minuend: Sample, subtrahend: Sample) -> Spread:
    """The spread of minuend - subtrahend in seconds, round by round."""
    return Spread.of(a - b for a, b in zip(minuend.seconds, subtrahend.seconds, strict=True))


def rotating(
    function: Callable[..., object], input_sets: Sequence[Sequence[object]]
) -> Callable[[], object]:
    """A call that takes the next set of inputs each time, so that no cache keeps them warm."""
    following = itertools.cycle(input_sets).__next__
    return lambda: function(*following())


def batch_time(candidate: Candidate, calls: int, device: str) -> float:
    """Seconds that `calls` calls take: device time between two events, or host time."""
    with candidate.context():
        if device == "cpu":
            return timeit.Timer(candidate.call).timeit(calls)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            candidate.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def warm_up(
    candidate: Candidate,
    device: str,
    *,
    batch_seconds: float,
    batches: int = WARM_UP_BATCHES,
    max_calls: int = 1 << 16,
) -> int:
    """Run until a batch is long enough to time and gets no shorter, at most `batches` of them.

    Returns:
        The number of calls in such a batch.
    """
    calls, seconds = 1, math.inf
    for _ in range(batches):
        before, seconds = seconds, batch_time(candidate, calls, device)
        if seconds < batch_seconds and calls < max_calls:
            wanted = math.ceil(1.1 * calls * batch_seconds / max(seconds, 1e-9))
            more = min(max(calls + 1, wanted), 8 * calls, max_calls)
            seconds, calls = seconds * more / calls, more
        elif seconds > (1.0 - SETTLED) * before:
            break
    return calls


def interleave(
    candidates: Sequence[Candidate],
    *,
    device: str = "cpu",
    rounds: int = 25,
    batch_seconds: float = 2e-3,
    warm_up_batches: int = WARM_UP_BATCHES,
    seconds: float = math.inf,
    least_rounds: int = 3,
) -> dict[str, Sample]:
    """Time the candidates, interleaved.

    Args:
        candidates: what to time; every second round runs them in the opposite order.
        device: "cpu" or "cuda".
        rounds: how many values to take of each.
        batch_seconds: the least length of one value; short calls are repeated to fill it.
        warm_up_batches: how many batches a warm-up has at most; with 0 a value is of one call.
        seconds: stop after this long, though not before `least_rounds` rounds.
        least_rounds: see `seconds`.

    Returns:
        The sample of each candidate, by name.
    """
    calls = {
        c.name: warm_up(c, device, batch_seconds=batch_seconds, batches=warm_up_batches)
        for c in candidates
    }
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    end = time.monotonic() + seconds
    for turn in range(rounds):
        if turn >= least_rounds and time.monotonic() > end:
            break
        for candidate in candidates if turn % 2 == 0 else reversed(candidates):
            count = calls[candidate.name]
            times[candidate.name].append(batch_time(candidate, count, device) / count)
    return {name: Sample(tuple(values), calls[name]) for name, values in times.items()}
