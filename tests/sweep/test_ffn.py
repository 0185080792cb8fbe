"""The feed-forward, forward and backward, at every tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.ffn.cases import Case, check
from sweep.device import ARCHITECTURE, DEVICE, DTYPES, GPU, HALVES

from fastattn.ops.common import launch
from fastattn.ops.ffn import cuda, tiles

# (tokens, in features, hidden features); sums of several blocks, tiles that are not full at the end.
SHAPES = {
    "few": (40, 336, 528) if GPU else (20, 144, 80),
    "unaligned": (201, 203, 333) if GPU else (131, 37, 67),
    "medium": (208, 336, 528) if GPU else (70, 144, 144),
    "large": (2500, 336, 4112) if GPU else (260, 144, 272),
}
ACTIVATIONS = {"few": "relu", "unaligned": "silu", "medium": "gelu", "large": "gelu_tanh"}


def table(size: int) -> dict[str, tiles.Tile]:
    large = tiles.LARGER.get(ARCHITECTURE, tiles.LARGE[size]) if size == 2 else tiles.LARGE[size]
    rows = (tiles.FEW[size], tiles.UNALIGNED[size], tiles.MEDIUM[size], large)
    return dict(zip(SHAPES, rows, strict=True))


def of(name: str, dtype: str, layout: str) -> Case:
    tokens, features, hidden = SHAPES[name]
    return Case(
        (tokens, features), hidden, features, getattr(torch, dtype), ACTIVATIONS[name], layout,
        recompute=layout == "conv1d", device=DEVICE.type,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("layout", ("linear", "conv1d"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_triton(
    name: str, dtype: str, layout: str, keep: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    tile = tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda *a, **k: taken.append(tile(*a, **k)) or taken[-1])
    keep(check(of(name, dtype, layout), "triton"))
    assert set(taken) == {table(getattr(torch, dtype).itemsize)[name]}


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
        for name, tile in table(size).items():
            tokens, _, hidden = SHAPES[name]
            aligned = name != "unaligned"
            assert tiles.tile(ARCHITECTURE, size, tokens, hidden, processors, aligned) == tile
