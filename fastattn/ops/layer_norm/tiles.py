"""Tiles of the norms' kernels: how much one program holds, and on how many warps.

Nothing here is measured on a GPU yet. The rows follow from the register file, 64 Ki registers of 32
bits per multiprocessor on every architecture since sm_80, of which a thread has at most 255:

- forward holds a row once: with 32 elements a thread, a row of 8192 takes up to 128 registers on
  each of 8 warps where the size is odd, and about 75 where loads are 16 bytes wide;
- backward holds it three times beside two accumulators: with 16 elements a thread, a row of 8192
  takes up to 128 registers on each of 16 warps, all that a multiprocessor has;
- longer rows are read in chunks, twice, the second time from the L2 cache.

Up to 1024 elements one warp holds a row of the forward and two one of the backward: sums then take
few shuffles and no barrier, or few. At 768 elements the forward issues 14 instructions of a thread
for an element (four warps with two rows: 25), the backward 26 (eight with two rows: 47), where an
H200 has time for 26 and 39 while its memory brings the element.

Compiled for sm_80, sm_90 and sm_100, no row of these tables spills.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastattn import chips
from fastattn.ops.common.tiles import power_of_two

MAX_HIDDEN = 65536
LEAST = 4  # dropout's random words come four at a time


@dataclass(frozen=True)
class Tile:
    """The tile that one program holds: `rows` x `block` elements."""

    rows: int
    block: int
    num_warps: int
    programs: int = 0  # per multiprocessor, for kernels whose programs loop over the rows


CHUNK = Tile(rows=1, block=4096, num_warps=8)
# A warp reads 512 contiguous bytes of a row of 16-bit elements; a block of columns is cut into as
# many row ranges as fill the multiprocessors.
COLUMNS = Tile(rows=8, block=256, num_warps=8, programs=6)
# Few columns a program, so that a small hidden size still gives work to many.
PARTIALS = Tile(rows=64, block=32, num_warps=4)


def forward(hidden: int) -> Tile:
    """Of the forward; `block` < `hidden` means in chunks."""
    block = max(LEAST, power_of_two(hidden))
    if block <= 1024:  # 32 elements a thread
        return Tile(rows=1024 // block, block=block, num_warps=1)
    if block <= 8192:
        return Tile(rows=1, block=block, num_warps=max(4, block // 1024))
    return CHUNK


def backward(hidden: int) -> Tile:
    """Of the backward; `block` < `hidden` means in chunks, and the weights' gradients apart."""
    block = max(LEAST, power_of_two(hidden))
    if block <= 1024:
        return Tile(rows=1024 // block, block=block, num_warps=2, programs=6)
    if block <= 8192:
        warps = max(8, block // 512)
        return Tile(rows=1, block=block, num_warps=warps, programs=min(3, 8192 // block))
    return CHUNK


def stages(architecture: int, tile: Tile, element_bytes: int) -> int:
    """2 for a loop that fetches the next rows while these are worked on, if shared memory allows.

    `element_bytes` is what a loop loads for one element, of all its inputs together. Up to 4 more
    are for results that change their layout before they are stored.
    """
    shared = tile.rows * tile.block * (element_bytes + 4)
    return 2 if shared < chips.shared_memory(architecture) else 1
