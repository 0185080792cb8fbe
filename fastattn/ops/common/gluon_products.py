"""Products of matrices on Hopper: the main loop of Gluon kernels, and a kernel that is only that.

    out = left right (+ more_left more_right) (+ bias)

A kernel is persistent: each program, one a multiprocessor, walks through tiles of 192 rows by 256
columns of the result, or by 128 of two results with the same left operand. Three consumers, each a
warpgroup, have 64 of the rows; a producer copies 64 terms of the sums at a time by TMA into a ring
of shared memory, and begins the next tile's while the consumers finish this one. A consumer waits
for its own products before it frees a stage: the tensor cores have those of the other two
meanwhile. What follows the products of a tile, each kernel has of its own.

An operand is *K-major* if its terms lie side by side in memory, as in a weight (out, in), else they
lie below each other; TMA and wgmma read both, so nothing is transposed or copied.

A trip of the ring reads (192 + 256) 64 elements from the L2 in 1536 clocks of products, 37.3 bytes
a clock; tiles of 128 by 256 would read 48. At 32 bytes a clock and multiprocessor, the copies of a
long sum take 1.17 times as long as its products, and a tile's end is hidden by the copies of the
next one's stages. Less needs multicast in a cluster: two programs that share the right operand's
columns read 26.7. More accumulators do not help: 192 by 256 are 128 of a thread's 160 registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import launch
from fastattn.ops.common.gluon import mbarrier, tma

CONSUMERS = gl.constexpr(3)
ROWS = gl.constexpr(64)  # of a consumer
HALF = gl.constexpr(128)  # columns of each of its two accumulators, 64 registers of a thread
TERMS = gl.constexpr(64)  # of the sums in a stage; 128 bytes, a row of the swizzle
STAGES = gl.constexpr(3)  # 168 KB; results on their way out have 48 KB
GROUP = gl.constexpr(8)  # rows of tiles that are walked through together, column by column
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
REGISTERS = gl.constexpr(160)  # of a consumer's thread; a multiprocessor has 64 K
REGISTERS_OF_PRODUCER = gl.constexpr(24)


class Kind(NamedTuple):
    """The constants of a main loop: which operands are K-major, and what the second half is."""

    LEFT: gl.constexpr
    FIRST: gl.constexpr
    SECOND: gl.constexpr
    PAIR: gl.constexpr  # of a matrix of its own; else of the first one's next columns
    MORE: gl.constexpr  # whether products of two other operands are added, which lie as these


class Operands(NamedTuple):
    """Descriptors: of the left operand, and of the right one of each half."""

    left: Any
    first: Any
    second: Any


class Walk(NamedTuple):
    """The tiles of the result, and the trips of each."""

    rows: Any  # of tiles
    columns: Any
    width: Any  # of the result
    trips: Any
    more: Any  # trips of the products that are added


class Ring(NamedTuple):
    """Shared memory of the operands and its barriers."""

    left: Any
    first: Any
    second: Any
    full: Any
    empty: Any


# --- main loop ------------------------------------------------------------------------------------


@gluon.jit
def allocate(desc, COUNT: gl.constexpr):
    """Shared memory of as many boxes."""
    shape: gl.constexpr = [COUNT] + desc.block_shape  # noqa: RUF005
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def make_ring(operands):
    left = allocate(operands.left, STAGES * CONSUMERS)
    first, second = allocate(operands.first, STAGES), allocate(operands.second, STAGES)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()  # before the copies see the barriers
    return Ring(left, first, second, full, empty)


@gluon.jit
def corner(tile, walk, kind: gl.constexpr):
    """The first row and column of a tile: rows of tiles in groups, column by column in a group."""
    WIDTH: gl.constexpr = HALF if kind.PAIR else 2 * HALF
    group = tile // (GROUP * walk.columns)
    within = tile % (GROUP * walk.columns)
    height = gl.minimum(walk.rows - group * GROUP, GROUP)
    row = (group * GROUP + within % height) * (CONSUMERS * ROWS)
    return row, within // height * WIDTH


@gluon.jit
def advance(slot, phase):
    slot += 1
    if slot == STAGES:
        slot = slot * 0
        phase ^= 1
    return slot, phase


@gluon.jit
def load(desc, line, term, full, smem, K_MAJOR: gl.constexpr):
    if K_MAJOR:
        tma.async_load(desc, [line, term], full, smem)
    else:
        tma.async_load(desc, [term, line], full, smem)


@gluon.jit
def fill(operands, trips, row, column, ring, slot, phase, kind: gl.constexpr):
    """Copy the operands of a tile's trips."""
    BYTES: gl.constexpr = 2 * TERMS * (CONSUMERS * ROWS + 2 * HALF)
    second = column
    if not kind.PAIR:
        second += HALF
    for i in range(trips):
        term = i * TERMS
        full = ring.full.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(full, BYTES)
        for c in gl.static_range(CONSUMERS):
            into = ring.left.index(slot * CONSUMERS + c)
            load(operands.left, row + c * ROWS, term, full, into, kind.LEFT)
        load(operands.first, column, term, full, ring.first.index(slot), kind.FIRST)
        load(operands.second, second, term, full, ring.second.index(slot), kind.SECOND)
        slot, phase = advance(slot, phase)
    return slot, phase


@gluon.jit
def produce(operands, more, walk, ring, kind: gl.constexpr):
    slot = walk.trips * 0
    phase = slot + 1  # the ring begins empty
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        slot, phase = fill(operands, walk.trips, row, column, ring, slot, phase, kind)
        if kind.MORE:
            slot, phase = fill(more, walk.more, row, column, ring, slot, phase, kind)


@gluon.jit
def turned(smem, TURN: gl.constexpr):
    if TURN:
        return smem.permute((1, 0))
    else:
        return smem


@gluon.jit
def multiply(walk, ring, slot, phase, kind: gl.constexpr, WHICH: gl.constexpr):
    """Both halves of a consumer's part of a tile, and where in the ring the next one begins."""
    first = gl.zeros([ROWS, HALF], gl.float32, ACCUMULATOR)
    second = gl.zeros([ROWS, HALF], gl.float32, ACCUMULATOR)
    trips = walk.trips
    if kind.MORE:
        trips += walk.more
    for _ in range(trips):
        mbarrier.wait(ring.full.index(slot), phase)
        left = turned(ring.left.index(slot * CONSUMERS + WHICH), not kind.LEFT)
        right = turned(ring.first.index(slot), kind.FIRST)
        other = turned(ring.second.index(slot), kind.SECOND)
        first = warpgroup_mma(left, right, first, is_async=True)
        second = warpgroup_mma(left, other, second, is_async=True)
        first, second = warpgroup_mma_wait(0, [first, second])
        mbarrier.arrive(ring.empty.index(slot), count=1)
        slot, phase = advance(slot, phase)
    return first, second, slot, phase


# --- the end of a tile ----------------------------------------------------------------------------


@gluon.jit
def biased(acc, bias_ptr, column, width, BIASED: gl.constexpr):
    if BIASED:
        columns = column + gl.arange(0, HALF, gl.SliceLayout(0, ACCUMULATOR))
        bias = gl.load(bias_ptr + columns, mask=columns < width, other=0.0)
        acc = acc + bias.to(gl.float32)[None, :]
    return acc


@gluon.jit
def put(value, desc, row, column, smem):
    """Store a tile; TMA cuts off the rows and columns that are not there."""
    tma.store_wait(0)  # the last one has left
    smem.store(value.to(desc.dtype))
    fence_async_shared()  # before the copy reads it
    tma.async_store(desc, [row, column], smem)


# --- a product ------------------------------------------------------------------------------------


@gluon.jit
def consume(
    bias_ptr, out_desc, walk, ring, smem, kind: gl.constexpr, BIASED: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    slot = walk.trips * 0
    phase = slot
    mine = smem.index(WHICH)
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        row += WHICH * ROWS
        first, second, slot, phase = multiply(walk, ring, slot, phase, kind, WHICH)
        put(biased(first, bias_ptr, column, walk.width, BIASED), out_desc, row, column, mine)
        column += HALF
        put(biased(second, bias_ptr, column, walk.width, BIASED), out_desc, row, column, mine)
    tma.store_wait(0)


@gluon.jit
def product_kernel(
    bias_ptr,  # (columns,); no matter unless BIASED
    left_desc,  # of (rows, terms), or of (terms, rows) unless LEFT
    right_desc,  # of (columns, terms), or of (terms, columns) unless RIGHT
    more_left_desc,  # the same, of other terms; no matter unless MORE
    more_right_desc,
    out_desc,  # of (rows, columns)
    tile_rows,
    tile_columns,
    columns,
    trips,
    more_trips,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    MORE: gl.constexpr,
    BIASED: gl.constexpr,
):
    """out = left right, plus more_left more_right, plus bias."""
    kind: gl.constexpr = Kind(LEFT, RIGHT, RIGHT, False, MORE)
    operands = Operands(left_desc, right_desc, right_desc)
    more = Operands(more_left_desc, more_right_desc, more_right_desc)
    walk = Walk(tile_rows, tile_columns, columns, trips, more_trips)
    ring = make_ring(operands)
    smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, ROWS, HALF], out_desc.layout)
    gl.warp_specialize(
        [
            (consume, (bias_ptr, out_desc, walk, ring, smem, kind, BIASED, 0)),
            (consume, (bias_ptr, out_desc, walk, ring, smem, kind, BIASED, 1)),
            (consume, (bias_ptr, out_desc, walk, ring, smem, kind, BIASED, 2)),
            (produce, (operands, more, walk, ring, kind)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS_OF_PRODUCER],
    )


# --- launching ------------------------------------------------------------------------------------


def tiles(rows: int, columns: int, pair: bool = False) -> tuple[int, int]:
    """Rows and columns of tiles of a result."""
    width = HALF.value * (1 if pair else 2)
    return -(-rows // (CONSUMERS.value * ROWS.value)), -(-columns // width)


def trips(terms: int) -> int:
    return -(-terms // TERMS.value)


def grid(tile_rows: int, tile_columns: int, device: torch.device) -> tuple[int]:
    """One program a multiprocessor, if there are as many tiles."""
    return (min(tile_rows * tile_columns, launch.multiprocessors(device)),)


def operand(
    matrix: torch.Tensor, lines: int, k_major: bool | None = None
) -> tuple[TensorDescriptor, bool]:
    """The descriptor of an operand, and whether it is K-major; copied if TMA cannot read it.

    Args:
        matrix: (lines, terms), as a right operand is if it is transposed.
        lines: of a box.
        k_major: how it has to lie, where that is not free.
    """
    if k_major is None:
        k_major = kernels.reads(matrix) or not kernels.reads(matrix.t())
    there = kernels.readable(matrix if k_major else matrix.t())
    box = [lines, TERMS.value] if k_major else [TERMS.value, lines]
    return kernels.descriptor(there, box), k_major


def result(matrix: torch.Tensor) -> TensorDescriptor:
    """The descriptor of a result, or of a matrix that the end of a tile reads; never copied."""
    return kernels.descriptor(matrix, [ROWS.value, HALF.value])


def product(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    bias: torch.Tensor | None = None,
    more: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """out = left right, plus the product of `more`, plus `bias`, added in float32, rounded once.

    Args:
        out: (rows, columns), float16 or bfloat16, contiguous, columns in steps of 8.
        left: (rows, terms) of the same dtype, any strides.
        right: (terms, columns).
        bias: (columns,).
        more: (left, right), of other terms.
    """
    (rows, columns), terms = out.shape, left.shape[1]
    left_desc, left_lies = operand(left, ROWS.value)
    right_desc, right_lies = operand(right.t(), HALF.value)
    more_descs, more_terms = (left_desc, right_desc), 0
    if more is not None:
        more_left, _ = operand(more[0], ROWS.value, left_lies)
        more_right, _ = operand(more[1].t(), HALF.value, right_lies)
        more_descs, more_terms = (more_left, more_right), more[0].shape[1]
    kernels.launch(
        product_kernel,
        grid(*tiles(rows, columns), out.device),
        out if bias is None else bias.contiguous(),  # no kernel reads the stand-in
        left_desc, right_desc, *more_descs, result(out),
        *tiles(rows, columns), columns, trips(terms), trips(more_terms),
        LEFT=left_lies, RIGHT=right_lies, MORE=more is not None, BIASED=bias is not None,
    )  # fmt: skip
