"""Tile sizes of products with an activation: one pure function, for launchers and checks.

Chosen from what a tile needs and checked by compiling: no spills, tensor cores for 16-bit types,
and shared memory within the chip's limit, which is 163 KB on sm_80, 99 KB on sm_86, 89 and 120, and
227 KB on sm_90 and 100. Not yet tuned by measurement.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# Tokens up to which the cost of a call is to read the weights.
FEW_TOKENS = 64


@dataclass(frozen=True)
class Tile:
    """`block_m` tokens by `block_n` hidden features, `block_k` terms of their sums at a time.

    `stages` blocks of both operands are in flight; `group_m` rows of tiles are walked through
    together, so that their operands stay in the L2.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8

    def programs(self, tokens: int, hidden: int) -> int:
        return -(-tokens // self.block_m) * -(-hidden // self.block_n)


# By bytes per element. IEEE float32 has no tensor cores: its operands go through registers.
# The narrowest tiles: as many programs as possible fetch weights, several blocks ahead.
FEW = {2: Tile(16, 32, 128, 4, 5), 4: Tile(16, 32, 64, 4, 3)}
# Operands that are not aligned go through registers too, element by element.
UNALIGNED = {2: Tile(128, 64, 32, 8, 2), 4: Tile(64, 64, 16, 8, 2)}
# For calls in which large tiles would leave multiprocessors idle.
MEDIUM = {2: Tile(64, 128, 64, 4, 4), 4: Tile(64, 64, 32, 8, 3)}
# What 99 KB of shared memory hold; for float32, 64 accumulators a thread.
LARGE = {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 128, 16, 8, 2)}
# By architecture: 128 accumulators a thread and blocks of 48 KB, on sm_90 for two warpgroups.
LARGER = {
    80: Tile(128, 256, 64, 8, 3),
    90: Tile(128, 256, 64, 8, 4),
    100: Tile(128, 256, 64, 8, 4),
    103: Tile(128, 256, 64, 8, 4),
}


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def tile(
    architecture: int,
    bytes_per_element: int,
    tokens: int,
    hidden: int,
    multiprocessors: int,
    aligned: bool,
    gated: bool = False,
) -> Tile:
    """The tile of a product with a (tokens, hidden) result, forward and backward.

    `aligned`: all sizes and strides that a model fixes are multiples of 16, so that operands are
    copied 16 bytes at a time and asynchronously, past the registers.

    `gated`: of two products of the same rows, the forward of a gated ffn. Two tiles of half the
    width have the accumulators and the operands of one, so the rows of the table hold for them;
    but sm_80 takes those of sm_86, for with 128 accumulators a thread it spills in the loop, where
    the fragments of both weights are fetched ahead.
    """
    if gated:
        architecture = 86 if architecture == 80 else architecture
        whole = tile(architecture, bytes_per_element, tokens, 2 * hidden, multiprocessors, aligned)
        return dataclasses.replace(whole, block_n=whole.block_n // 2)
    if tokens <= FEW_TOKENS:
        return FEW[bytes_per_element]
    if not aligned:
        return UNALIGNED[bytes_per_element]
    large = LARGE[bytes_per_element]
    if bytes_per_element == 2:
        large = LARGER.get(architecture, large)
    enough = large.programs(tokens, hidden) >= multiprocessors
    return large if enough else MEDIUM[bytes_per_element]
