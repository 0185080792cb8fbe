"""Tile sizes of the attention kernels: one table, read by one pure function.

The rows were chosen by compiling: the largest tiles whose registers (255 a thread) and shared
memory (163 KB a block on sm_80, 99 KB on sm_86, 89 and 120, 227 KB on sm_90 and 100) hold them.
None has been tuned by measurement on a GPU yet. `tests/compile` compiles every row and holds it to
a budget of 192 bytes of spilled registers a thread; the rows that spill at all say so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`block_m` queries by `block_n` keys, `warps` a program, `stages` tiles in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


FORWARD = "forward"  # a query tile stays, key and value tiles stream
DECODE = "decode"  # the forward, for so few queries that the time goes into reading keys and values
KEYS = "keys"  # dK, dV: a key tile stays with two accumulators, query and dO tiles stream
QUERIES = "queries"  # dQ: a query tile and its dO stay, key and value tiles stream

# (kernel, chip, head_dim up to): (tile, tile with a mask). A mask takes registers of its own.
# "hopper" stands for every chip with 227 KB of shared memory and warpgroup-wide matmuls;
# "blackwell" (sm_100) has rows where its tensor memory's code takes more registers than Hopper's.
_16_BIT = {
    # 8 warps of 16 rows each are two warpgroups; 3 stages of 16 KB tiles hide the loads.
    (FORWARD, "hopper", 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    # 32 KB of q and 2 x 64 KB of k and v; with a mask 32 bytes spill.
    (FORWARD, "hopper", 128): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
    # The accumulator alone takes 128 registers a thread: 64 keys would spill 112 bytes.
    (FORWARD, "hopper", 256): (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    (FORWARD, "blackwell", 128): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    (FORWARD, "ampere", 64): (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3)),
    (FORWARD, "ampere", 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),  # 24 bytes spill
    (FORWARD, "ampere", 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (DECODE, "hopper", 64): (Tile(16, 128, 4, 3), Tile(16, 128, 4, 3)),
    (DECODE, "hopper", 128): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
    (DECODE, "hopper", 256): (Tile(16, 32, 4, 3), Tile(16, 32, 4, 3)),
    (DECODE, "ampere", 64): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
    (DECODE, "ampere", 128): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
    (DECODE, "ampere", 256): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    (KEYS, "hopper", 64): (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
    # Two accumulators of 64 registers; causal spills 136 bytes, 64 keys would halve the reuse.
    (KEYS, "hopper", 128): (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
    (KEYS, "blackwell", 128): (Tile(32, 128, 8, 1), Tile(32, 64, 8, 1)),
    (KEYS, "hopper", 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (KEYS, "ampere", 64): (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),  # up to 40 bytes spill
    (KEYS, "ampere", 128): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),  # 56 bytes spill with a mask
    (KEYS, "ampere", 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),  # 40 bytes spill with a mask
    (QUERIES, "hopper", 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    (QUERIES, "hopper", 128): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    (QUERIES, "hopper", 256): (Tile(128, 32, 8, 1), Tile(32, 32, 8, 1)),
    (QUERIES, "ampere", 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),  # 48 bytes with a mask
    (QUERIES, "ampere", 128): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    (QUERIES, "ampere", 256): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),  # 96 of 99 KB
}
# IEEE fp32 products run on the FMA units, whose operands Triton holds in registers: small tiles.
_32_BIT = {
    (FORWARD, 128): Tile(32, 32, 8, 1),
    (FORWARD, 256): Tile(16, 16, 8, 1),
    (DECODE, 128): Tile(16, 32, 8, 1),
    (DECODE, 256): Tile(16, 16, 8, 1),
    (KEYS, 128): Tile(32, 32, 8, 1),
    (KEYS, 256): Tile(16, 16, 8, 1),
    (QUERIES, 128): Tile(16, 32, 8, 1),
    (QUERIES, 256): Tile(16, 16, 8, 1),
}


DECODE_QUERIES = 16  # up to which the forward takes the rows of DECODE


def block_d(head_dim: int) -> int:
    """head_dim padded to what tl.dot takes: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(
    kernel: str, architecture: int, bytes_per_element: int, head_dim: int, has_mask: bool
) -> Tile:
    """The row of the table.

    Args:
        kernel: FORWARD, DECODE, KEYS or QUERIES.
        architecture: compute capability, e.g. 90.
        bytes_per_element: 2 or 4.
        head_dim: up to 256.
        has_mask: whether a mask tensor is read.
    """
    width = block_d(head_dim)
    if bytes_per_element == 4:
        return _32_BIT[kernel, max(128, width)]
    chip = "hopper" if 90 <= architecture < 120 else "ampere"
    if 100 <= architecture < 120 and (kernel, "blackwell", width) in _16_BIT:
        chip = "blackwell"
    return _16_BIT[kernel, chip, max(64, width)][has_mask]
