"""Learning rates over a run: a warm-up, then one of these curves from the peak down to the end.

A schedule says how much of the way from the final rate up to the peak is left when a share
`progress` in [0, 1] of the steps after the warm-up is done. A new one is a function and a name in
`SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(progress: float, decay_share: float) -> float:
    return 1.0


def linear(progress: float, decay_share: float) -> float:
    return 1 - progress


def cosine(progress: float, decay_share: float) -> float:
    """Half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float, decay_share: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395), the decay being a line."""
    return min(1.0, (1 - progress) / decay_share)


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    schedule.__name__: schedule for schedule in (cosine, linear, constant, wsd)
}
