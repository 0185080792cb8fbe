"""The feed-forward, forward and backward, at every tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.ffn.cases import Case, check
from sweep.device import ARCHITECTURE, DEVICE, DTYPES, GPU, HALVES

from fastattn.ops.common import launch, tiles
from fastattn.ops.ffn import cuda

# (tokens, in features, hidden features); sums of several blocks, tiles that are not full at the end.
SHAPES = {
    "few": (40, 336, 528) if GPU else (20, 144, 80),
    "unaligned": (201, 203, 333) if GPU else (131, 37, 67),
    "medium": (208, 336, 528) if GPU else (70, 144, 144),
    "large": (2500, 336, 4112) if GPU else (260, 144, 272),
}
ACTIVATIONS = {"few": "relu", "unaligned": "silu", "medium": "gelu", "large": "gelu_tanh"}


def table(size: int, gated: bool) -> dict[str, tiles.Tile]:
    """The tiles of the shapes; with a gate those of the forward, half as wide."""
    large = tiles.LARGE[size]
    if size == 2 and not (gated and ARCHITECTURE == 80):
        large = tiles.LARGER.get(ARCHITECTURE, large)
    rows = (tiles.FEW[size], tiles.UNALIGNED[size], tiles.MEDIUM[size], large)
    if gated:
        rows = tuple(dataclasses.replace(row, block_n=row.block_n // 2) for row in rows)
    return dict(zip(SHAPES, rows, strict=True))


def of(name: str, dtype: str, layout: str, gated: bool = False) -> Case:
    tokens, features, hidden = SHAPES[name]
    return Case(
        (tokens, features), hidden, features, getattr(torch, dtype), ACTIVATIONS[name], layout,
        recompute=layout == "conv1d", gated=gated, device=DEVICE.type,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("layout", ("linear", "conv1d"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gated", (False, True))
def test_triton(
    gated: bool, name: str, dtype: str, layout: str, keep: Callable[[Any], None], taken: list[Any]
) -> None:
    keep(check(of(name, dtype, layout, gated), "triton"))
    size = getattr(torch, dtype).itemsize
    assert {*taken} == {table(size, which)[name] for which in {False, gated}}


@pytest.mark.long
@pytest.mark.parametrize("layout", ("linear", "conv1d"))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SHAPES)
def test_cuda(
    name: str, dtype: str, layout: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own products, also where cuBLASLt would do them."""
    emulator.checks(0)
    monkeypatch.setattr(cuda, "cublaslt_version", lambda: 0)
    check(of(name, dtype, layout), "cuda")


def test_every_tile_is_swept() -> None:
    """Those of the table for this architecture are the four that the shapes above come to."""
    processors = launch.multiprocessors(DEVICE)
    for dtype in DTYPES:
        size = getattr(torch, dtype).itemsize
        for gated in (False, True):
            for name, tile in table(size, gated).items():
                tokens, _, hidden = SHAPES[name]
                call = ARCHITECTURE, size, tokens, hidden, processors, name != "unaligned", gated
                assert tiles.tile(*call) == tile
