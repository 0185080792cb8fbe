"""Tile sizes of the attention kernels: one table, read by one pure function.

The rows were chosen from machine code: of the tiles whose registers (255 a thread) and shared
memory (163 KB a block on sm_80, 99 KB on sm_86, 89 and 120, 227 KB on sm_90 and 100) hold them,
the one with the highest estimated share of the tensor cores' peak (docs/kernels.md). Three stages
are the least that fetch ahead on sm_90: Triton issues a trip's copies after its products, and with
two stages the next trip begins by waiting for them. None has been tuned by measurement on a GPU
yet: `fastattn tune` does that on the GPU at hand. `tests/compile` compiles the rows and holds them
to budgets of spilled registers (test_kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.problem import AttentionProblem


@dataclass(frozen=True)
class Tile:
    """`block_m` queries by `block_n` keys, `warps` a program, `stages` tiles in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def within(self, block_q: int, block_k: int) -> Tile:
        """This tile, or as much of it as a tile of a block mask (0: none) holds."""
        if not block_q:
            return self
        return replace(self, block_m=min(self.block_m, block_q), block_n=min(self.block_n, block_k))


MAX_BLOCK_N = 128

PLAIN, FEATURED, CROWDED = MASKINGS = ("plain", "featured", "crowded")
FORWARD = "forward"  # a query tile stays, key and value tiles stream
DECODE = "decode"  # the forward, for so few queries that the time goes into reading keys and values
KEYS = "keys"  # dK, dV: a key tile stays with two accumulators, query and dO tiles stream
QUERIES = "queries"  # dQ: a query tile and its dO stay, key and value tiles stream
BIAS = "bias"  # dbias: a tile of the scores stays, batches and heads stream

# (kernel, chip, head_dim up to): (PLAIN, FEATURED, CROWDED). What a feature loads and computes for
# every score takes registers of its own. "hopper" stands for every chip with 227 KB of shared
# memory and warpgroup-wide matmuls; "blackwell" (sm_100) has rows where its tensor memory's code
# takes more registers than Hopper's.
_16_BIT = {
    # Half as many keys as below, so that 127 registers are enough and a multiprocessor holds two
    # blocks, one of which multiplies while the other one is in its softmax.
    (FORWARD, "hopper", 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
    # 32 KB of q and 3 x 64 KB of k and v. With features 2 stages of 64 keys are products that wait
    # for each other (ptxas C7515), and with all of them 2 stages of 32 keys.
    (FORWARD, "hopper", 128): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 1)),
    # The accumulator by itself takes 128 registers a thread: 64 keys would spill 112 bytes.
    (FORWARD, "hopper", 256): (Tile(128, 32, 8, 3), Tile(64, 32, 8, 3), Tile(64, 16, 8, 2)),
    (FORWARD, "hopper", 512): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    (FORWARD, "blackwell", 128): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    (FORWARD, "ampere", 64): (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    # 4 warps of 32 rows each read k and v from shared memory half as often as 8 of 16 rows.
    (FORWARD, "ampere", 128): (Tile(128, 32, 4, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    (FORWARD, "ampere", 256): (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (FORWARD, "ampere", 512): (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    (DECODE, "hopper", 64): (Tile(16, 128, 4, 3), Tile(16, 128, 4, 3), Tile(16, 64, 4, 2)),
    (DECODE, "hopper", 128): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 32, 4, 2)),
    (DECODE, "hopper", 256): (Tile(16, 32, 4, 3), Tile(16, 32, 4, 3), Tile(16, 32, 4, 2)),
    (DECODE, "hopper", 512): (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (DECODE, "ampere", 64): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
    (DECODE, "ampere", 128): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
    (DECODE, "ampere", 256): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    (DECODE, "ampere", 512): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    (KEYS, "hopper", 64): (Tile(64, 128, 8, 3), Tile(32, 128, 8, 2), Tile(32, 32, 8, 2)),
    # Two accumulators of 64 registers; 64 keys would halve the reuse of what streams, and with 64
    # queries Triton 3.9 spills inside the loop.
    (KEYS, "hopper", 128): (Tile(32, 128, 8, 3), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    # wgmma takes 64 keys, whose two accumulators leave too few registers: every such tile spills
    # hundreds of bytes. This one multiplies by mma.sync, on two blocks a multiprocessor.
    (KEYS, "hopper", 256): (Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (KEYS, "hopper", 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    # Hopper's row would spill 368 bytes.
    (KEYS, "blackwell", 64): (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 2)),
    (KEYS, "blackwell", 128): (Tile(32, 128, 8, 1), Tile(32, 64, 8, 1), Tile(32, 32, 8, 1)),
    (KEYS, "ampere", 64): (Tile(64, 128, 8, 3), Tile(32, 128, 8, 2), Tile(32, 32, 8, 2)),
    # 98,816 bytes of the 99 KB that a block has on sm_86.
    (KEYS, "ampere", 128): (Tile(32, 128, 8, 3), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    (KEYS, "ampere", 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (KEYS, "ampere", 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    # One warpgroup of at most 168 registers a thread, so that a multiprocessor holds three blocks.
    (QUERIES, "hopper", 64): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
    # With features 64 keys and 2 stages are products that wait for each other (ptxas C7515), and 3
    # stages and a bias do not fit.
    (QUERIES, "hopper", 128): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 16, 8, 1)),
    (QUERIES, "hopper", 256): (Tile(128, 32, 8, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    (QUERIES, "hopper", 512): (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    # 32 rows a warp, as in the forward; a handful of spills in the loop buys twice the products.
    (QUERIES, "ampere", 64): (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    (QUERIES, "ampere", 128): (Tile(128, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
    (QUERIES, "ampere", 256): (Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(64, 16, 8, 1)),
    (QUERIES, "ampere", 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (BIAS, "hopper", 64): (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)),
    (BIAS, "hopper", 128): (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)),
    (BIAS, "hopper", 256): (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 32, 8, 1)),
    (BIAS, "hopper", 512): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (BIAS, "ampere", 64): (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)),
    (BIAS, "ampere", 128): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    (BIAS, "ampere", 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (BIAS, "ampere", 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# IEEE fp32 products run on the FMA units, whose operands Triton holds in registers: small tiles.
_32_BIT = {
    (FORWARD, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (FORWARD, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (FORWARD, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (DECODE, 128): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (DECODE, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (DECODE, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (KEYS, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (KEYS, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    # 131 KB of shared memory, 2 KB spilled.
    (KEYS, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (QUERIES, 128): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (QUERIES, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (QUERIES, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (BIAS, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (BIAS, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (BIAS, 512): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


# Query rows (queries times the heads that share a key head) up to which the forward takes the rows
# of DECODE, packs those heads into one tile and splits the keys.
DECODE_ROWS = 16

# Keys of one part of a sequence, at least: its float32 result is then at most a hundredth of what
# it reads. A constant, so that how a sequence is cut, and with it every bit of its result, follows
# from its length only.
SPLIT_KEYS = 256

# Parts of a sequence, counted over its key heads and tiles of queries: enough to fill a GPU with
# one sequence. A longer one has longer parts, so that the memory for their results is bounded.
MOST_PARTS = 512

# Programs of a decode that a multiprocessor gets, a few times what it holds at once: they take the
# parts that there are in turns, whatever the cache has room for.
PROGRAMS = 16


def block_d(head_dim: int) -> int:
    """head_dim padded to what tl.dot takes: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def masking(extras: Extras, settings: Settings) -> str:
    """How much a score needs beside its position: PLAIN nothing, FEATURED one thing, CROWDED more.

    A mask counts double, for its bytes are loaded one by one, each into a register of its own.
    """
    per_element = (
        extras.mask, extras.mask, extras.bias, extras.alibi_slopes, extras.q_documents,
        extras.blocks, extras.dropout_seed, settings.softcap or None,
    )  # fmt: skip
    return MASKINGS[min(2, sum(x is not None for x in per_element))]


def tile(
    kernel: str, architecture: int, bytes_per_element: int, head_dim: int, masking: str
) -> Tile:
    """The row of the table.

    Args:
        kernel: FORWARD, DECODE, KEYS, QUERIES or BIAS.
        architecture: compute capability, e.g. 90.
        bytes_per_element: 2 or 4.
        head_dim: the larger one of q's and v's, up to 512.
        masking: PLAIN, FEATURED or CROWDED.
    """
    if kernel in overrides:
        return overrides[kernel]
    key = row(kernel, architecture, bytes_per_element, head_dim)
    table: dict[Any, tuple[Tile, Tile, Tile]] = _32_BIT if bytes_per_element == 4 else _16_BIT
    return table[key][MASKINGS.index(masking)]


overrides: dict[str, Tile] = {}  # of `overridden`


@contextmanager
def overridden(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, `kernel` takes `tile` whatever the table says: for `fastattn tune` and tests."""
    before = overrides.get(kernel)
    overrides[kernel] = tile
    try:
        yield
    finally:
        del overrides[kernel]
        if before is not None:
            overrides[kernel] = before


def row(
    kernel: str, architecture: int, bytes_per_element: int, head_dim: int
) -> tuple[str | int, ...]:
    """The key of the table's row that `tile` reads."""
    width = block_d(head_dim)
    if bytes_per_element == 4:
        return kernel, max(128, width)
    width = max(64, width)
    chip = "hopper" if 90 <= architecture < 120 else "ampere"
    if 100 <= architecture < 120 and (kernel, "blackwell", width) in _16_BIT:
        chip = "blackwell"
    return kernel, chip, width


def is_decode(seqlen_q: int, group_size: int) -> bool:
    """Whether so few rows share a key head that the time goes into reading keys and values."""
    return seqlen_q * group_size <= DECODE_ROWS


def few_queries(problem: AttentionProblem) -> str | None:
    """The reason why the automatic choice passes over a kernel that does not split the keys."""
    few = is_decode(problem.seqlen_q, problem.group_size) and not problem.is_empty
    if problem.packed or not few:
        return None
    return "for so few queries the Triton kernel splits the keys, and packs the heads of a key head"


class Split(NamedTuple):
    """How a decode is cut; `part_length` of the kernels has the rule for one sequence's keys."""

    most: int  # parts of a sequence
    keys: int  # of a part, at least
    programs: int  # of the grid


def split(
    seqlen_k: int,
    batch: int,
    tiles: int,
    multiprocessors: int,
    wanted: int | None,
    least: int | None = None,
) -> Split:
    """The cut of a decode of `batch` sequences, each `tiles` programs before splitting.

    Args:
        seqlen_k: keys that a sequence can have. Only the device knows how many it has.
        wanted: None: parts of SPLIT_KEYS, or longer ones where a sequence would have more than its
            share of MOST_PARTS, whatever the batch is. 0: as many as fill the chip twice. n: n
            parts.
        least: keys of a part, at least, a multiple of MAX_BLOCK_N, if not these.
    """
    keys = least or (MAX_BLOCK_N if wanted else SPLIT_KEYS)
    if wanted is None:
        most = MOST_PARTS // max(1, tiles)
    else:
        most = wanted or -(-2 * multiprocessors // max(1, batch * tiles))
    most = max(1, min(most, -(-seqlen_k // keys)))
    return Split(most, keys, min(batch * tiles * most, multiprocessors * PROGRAMS))
