"""Tiles of cross_entropy's kernels: rows by classes, and warps.

Nothing here is measured on a GPU yet. The kernels move memory: a thread has 16 elements, two loads
of 16 bytes of 16-bit logits, and a row of a vocabulary is gone through in blocks of 4096, so that a
few rows per multiprocessor hide each other's latency. Rows shorter than 1024 share a tile, of which
a thread has 8 elements: with 16, sums of several rows spill. Compiled for sm_80, sm_90 and sm_100
no row spills.
"""

from __future__ import annotations

from typing import NamedTuple

from fastattn.ops.common.tiles import power_of_two


class Tile(NamedTuple):
    """`rows` x `block` elements of one program."""

    rows: int
    block: int
    num_warps: int


LARGEST = 4096


def forward(classes: int) -> Tile:
    block = min(LARGEST, power_of_two(classes))
    rows = min(32, max(1, 1024 // block))
    return Tile(rows, block, 4 if rows > 1 else max(1, block // 512))


def backward(classes: int) -> Tile:
    """As the forward's: it holds the same, and the gradient in place of the sums."""
    return forward(classes)
