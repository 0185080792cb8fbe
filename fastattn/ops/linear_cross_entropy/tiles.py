"""Tiles of linear_cross_entropy's kernels, and how their work is cut.

Nothing here is measured on a GPU yet. The tiles follow from the registers: a tile of logits is a
product's accumulators, 64 a thread, and its scores and exponentials stand beside them. Compiled for
sm_80, sm_90 and sm_100 none spills, and all fit the 99 KB of shared memory of the smallest chip.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`block_m` rows by `block_n` classes, `block_k` terms of their sums at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8  # rows of tiles that are walked through together


# By bytes per element. IEEE float32 has no tensor cores: its operands go through registers.
ALIGNED = {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 64, 16, 8, 2)}
# Operands that are not aligned are loaded element by element.
UNALIGNED = {2: Tile(128, 64, 32, 8, 2), 4: Tile(64, 64, 16, 8, 2)}

# Logits of a chunk that is in memory: 512 MB of 16 bits.
CHUNK = 1 << 28
# The rows of a chunk are a multiple of these: whole tiles of ATen's products, and parts of a tensor
# that begin at multiples of 16 bytes, for which Triton compiles nothing new.
ROWS = 128


def tile(bytes_per_element: int, aligned: bool) -> Tile:
    """`aligned`: all sizes and strides of the operands are multiples of 16 elements."""
    return (ALIGNED if aligned else UNALIGNED)[bytes_per_element]


def splits(tile: Tile, rows: int, classes: int, multiprocessors: int) -> int:
    """Into how many parts the forward cuts the classes, so that all multiprocessors have work."""
    programs = max(1, -(-rows // tile.block_m))
    return max(1, min(-(-2 * multiprocessors // programs), -(-classes // tile.block_n)))


def chunk(block_m: int, rows: int, classes: int) -> int:
    """Rows of a chunk of the backward: whole tiles of `block_m`, and at least one."""
    fit = max(1, CHUNK // classes // block_m) * block_m
    return min(fit, max(1, rows))


def rows_at_once(rows: int, classes: int, features: int, bytes_per_element: int) -> int:
    """Rows of a chunk of the forward that makes the gradients: all, or whole products' tiles.

    Each chunk after the first adds V x D float32 numbers to the weight's gradient: 10 bytes of
    traffic for each, with a product in 16 bits, against 6 V D operations a row. So the fewer chunks
    the faster. In 16 bits the sum takes 4 V D bytes more than its result, as much as the logits of
    2 D rows: a chunk may be that much larger, and all rows are one if the sum's 4 V D bytes, which
    are then not there, are enough for the rest.
    """
    free = 2 * features if bytes_per_element == 2 else 0
    fit = CHUNK // classes + free
    if rows <= max(fit + free, ROWS):
        return max(1, rows)
    chunks = -(-rows // max(ROWS, fit // ROWS * ROWS))
    return -(-rows // (chunks * ROWS)) * ROWS
