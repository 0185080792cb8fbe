"""One call of each feature of the README's table, on the backends with kernels, in 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.attention.cases import Case, check
from sweep.device import DEVICE, HALVES
from test_features import FEATURES


def cases() -> dict[str, Case]:
    """Those of calls with a forward and a backward; what is only a dtype is there already."""
    found: dict[Case, str] = {}
    for name, feature in FEATURES.items():
        if feature.case is not None:
            in_half = dataclasses.replace(
                feature.case, dtype=getattr(torch, HALVES[0]), device=DEVICE.type
            )
            found.setdefault(in_half, name)
    return {name: case for case, name in found.items()}


CASES = cases()


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_triton(name: str, keep: Callable[[Any], None]) -> None:
    keep(check(CASES[name], "triton"))


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str, emulator: Emulator) -> None:
    """Or it is refused, for the reason that the table of reasons has."""
    emulator.checks(0)
    check(CASES[name], "cuda")
