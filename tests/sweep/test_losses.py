"""cross_entropy and linear_cross_entropy, forward and backward, at every tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.cross_entropy.cases import OPTIONS, Case, check
from sweep.device import DEVICE, DTYPES, GPU

from fastattn.ops.cross_entropy import tiles
from fastattn.ops.linear_cross_entropy import tiles as linear_tiles

# A number of classes for each tile of cross_entropy, that does not fill it.
CLASSES = (1, 2, *(2**n - 1 for n in range(2, 13)))
OF_TILE = {tiles.forward(classes): classes for classes in CLASSES} | {
    tiles.forward(tiles.LARGEST + 1): 3 * tiles.LARGEST + 5
}
# (rows, classes, features): several tiles each way, none full at the end.
SHAPES = {
    "aligned": (300, 4160, 512) if GPU else (140, 144, 64),
    "unaligned": (300, 4157, 333) if GPU else (140, 141, 37),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", OF_TILE.values())
def test_cross_entropy(classes: int, dtype: str, keep: Callable[[Any], None]) -> None:
    rows, kind = 2 * tiles.forward(classes).rows + 1, getattr(torch, dtype)
    options = OPTIONS["everything"]
    case = Case((rows,), classes, dtype=kind, weighted=True, options=options, device=DEVICE.type)
    keep(check(case, "triton"))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("of", ("everything", "everything, mean"))
def test_linear_cross_entropy(
    of: str, name: str, dtype: str, keep: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a chunk that is not the only one; a mean's gradients are made in the forward."""
    rows, classes, features = SHAPES[name]
    kind, options = getattr(torch, dtype), OPTIONS[of]
    tile = linear_tiles.tile(kind.itemsize, name == "aligned")
    monkeypatch.setattr(linear_tiles, "CHUNK", tile.block_m * classes)
    case = Case(
        (rows,), classes, features, kind, bias=True, weighted=True, options=options,
        device=DEVICE.type,
    )  # fmt: skip
    keep(check(case, "triton"))


def test_every_tile_is_swept() -> None:
    """The tables have no row but those of the cases above."""
    found = {tiles.forward(n) for n in range(1, 3 * tiles.LARGEST)}
    assert found | {tiles.backward(n) for n in range(1, 3 * tiles.LARGEST)} == {*OF_TILE}
    for table in (linear_tiles.ALIGNED, linear_tiles.UNALIGNED):
        assert {*table} == {2, 4}
