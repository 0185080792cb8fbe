"""The norms, forward and backward, at every tile that a hidden size can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.layer_norm.cases import Case, check
from sweep.device import DEVICE, DTYPES, GPU, HALVES

from fastattn.ops.common import launch
from fastattn.ops.layer_norm import tiles


def sizes() -> list[int]:
    """Of each pair of tiles a hidden size that fills its rows, and one that does not."""
    found: dict[Any, int] = {}
    powers = [2**n for n in range(17)]
    for hidden in (*powers, *(3 * n // 4 for n in powers[2:])):
        whole = hidden & (hidden - 1) == 0
        found[tiles.forward(hidden), tiles.backward(hidden), whole] = hidden
    return sorted(found.values(), reverse=True)


# On a CPU some: of several rows a program, of one row, of one in chunks.
SIZES = sizes() if GPU else [n for n in sizes() if n in (768, 1024, 3072, 12288)]
VARIANTS = {
    "layer_norm": {},
    "layer_norm, residual": {"residual": True},
    "rms_norm": {"center": False},
    "rms_norm, residual": {"center": False, "residual": True},
}


def of(dtype: str, hidden: int, variant: str) -> Case:
    """With so many rows that programs go through several tiles, the last one not full."""
    kind = getattr(torch, dtype)
    tile = tiles.backward(hidden)
    programs = max(1, tile.programs) * launch.multiprocessors(DEVICE)
    rows = tile.rows * (programs + 1) + 1
    center, residual = (VARIANTS[variant].get(x, x == "center") for x in ("center", "residual"))
    return Case(
        (rows, hidden), kind, center, kind, kind, kind if residual else None, device=DEVICE.type
    )


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("variant", VARIANTS if GPU else ["layer_norm, residual", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", SIZES)
def test_triton(hidden: int, dtype: str, variant: str, keep: Callable[[Any], None]) -> None:
    keep(check(of(dtype, hidden, variant), "triton"))


@pytest.mark.parametrize("variant", VARIANTS if GPU else ["layer_norm, residual", "rms_norm"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hidden", SIZES if GPU else (768, 3072))
def test_cuda(hidden: int, dtype: str, variant: str, emulator: Emulator) -> None:
    emulator.checks(0)
    check(of(dtype, hidden, variant), "cuda")
