"""Products of matrices on Hopper: the main loop of Gluon kernels, and a kernel that is only that.

    out = left right (+ more_left more_right) (+ bias)

A kernel is persistent: each program, one a multiprocessor, walks through tiles of 192 rows by 256
columns of the result, or by 128 of two results with the same left operand. Three consumers, each a
warpgroup, have 64 of the rows; a producer copies 64 terms of the sums at a time by TMA into a ring
of shared memory, and begins the next tile's while the consumers finish this one. A consumer waits
for its own products before it frees a stage: the tensor cores have those of the other two
meanwhile. What follows the products of a tile, each kernel has of its own.

Two programs are a *cluster* where there are rows for both: they have the same columns, and one
copies the right operand to both. To Gluon they are one program of tiles twice as high, of which
each has its half (`cga_layout`): a consumer has 128 rows, 64 in each. A stage has three barriers:
`full` and `empty` of each program, and `shared` in the first, where the consumers of both arrive.

An operand is *K-major* if its terms lie side by side in memory, as in a weight (out, in), else they
lie below each other; TMA and wgmma read both, so nothing is transposed or copied.

A trip of the ring reads (192 + 256 / 2) 64 elements from the L2 in 1536 clocks of products, 26.7
bytes a clock and multiprocessor; without a cluster 37.3, which at 32 bytes a clock takes 1.17 times
as long as the products.
"""

from __future__ import annotations

import math
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
ROWS = gl.constexpr(64)  # of a consumer, in each program of a cluster
HALF = gl.constexpr(128)  # columns of each of its two accumulators, 64 registers of a thread
STRIP = gl.constexpr(64)  # columns that a long end treats at once, for want of registers
TERMS = gl.constexpr(64)  # of the sums in a stage; 128 bytes, a row of the swizzle
STAGES = gl.constexpr(3)  # 168 KB; results on their way out have 48 KB
GROUP = gl.constexpr(8)  # rows of tiles that are walked through together, column by column
REGISTERS = gl.constexpr(160)  # of a consumer's thread; a multiprocessor has 64 K
REGISTERS_OF_PRODUCER = gl.constexpr(24)


@gluon.constexpr_function
def accumulator(programs, columns=128):
    """The layout of a consumer's rows: 64 in each program of a cluster."""
    if programs == 1:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16], cga_layout=[[1, 0]])


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
    shared: Any  # of the right operands' slots in both programs of a cluster; without one unused


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
    shared = empty
    if gl.num_ctas() > 1:
        shared = mbarrier.allocate_mbarrier(batch=STAGES, two_ctas=True)
        for i in gl.static_range(STAGES):
            mbarrier.init(shared.index(i), count=CONSUMERS)  # of each program
    fence_async_shared()  # before the copies see the barriers
    return Ring(left, first, second, full, empty, shared)


@gluon.jit
def leave():
    """End together: until then the other program of a cluster may arrive at this one's barriers."""
    if gl.num_ctas() > 1:
        gl.barrier(cluster=True)


@gluon.jit
def corner(tile, walk, kind: gl.constexpr):
    """The first row and column of a tile: rows of tiles in groups, column by column in a group."""
    WIDTH: gl.constexpr = HALF if kind.PAIR else 2 * HALF
    group = tile // (GROUP * walk.columns)
    within = tile % (GROUP * walk.columns)
    height = gl.minimum(walk.rows - group * GROUP, GROUP)
    row = (group * GROUP + within % height) * (CONSUMERS * ROWS * gl.num_ctas())
    return row, within // height * WIDTH


@gluon.jit
def advance(slot, phase):
    slot += 1
    if slot == STAGES:
        slot = slot * 0
        phase ^= 1
    return slot, phase


@gluon.jit
def load(desc, line, term, full, smem, K_MAJOR: gl.constexpr, SHARED: gl.constexpr):
    at = (line, term) if K_MAJOR else (term, line)
    if SHARED and gl.num_ctas() > 1:
        tma.async_load(desc, at, full, smem, multicast=True)
    else:
        tma.async_load(desc, at, full, smem)


@gluon.jit
def fill(operands, trips, row, column, ring, slot, phase, kind: gl.constexpr):
    """Copy the operands of a tile's trips.

    In a cluster only the first program waits for `shared`, and copies the right operands to both.
    The other's may come before it expects them: its `full` counts their bytes, and waits for it.
    """
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
            load(operands.left, row + c * ROWS * gl.num_ctas(), term, full, into, kind.LEFT, False)
        if gl.num_ctas() > 1:
            mbarrier.wait(ring.shared.index(slot), phase)
        load(operands.first, column, term, full, ring.first.index(slot), kind.FIRST, True)
        load(operands.second, second, term, full, ring.second.index(slot), kind.SECOND, True)
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
    layout: gl.constexpr = accumulator(gl.num_ctas())
    first = gl.zeros([ROWS * gl.num_ctas(), HALF], gl.float32, layout)
    second = gl.zeros([ROWS * gl.num_ctas(), HALF], gl.float32, layout)
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
        if gl.num_ctas() > 1:
            mbarrier.arrive(ring.shared.index(slot), count=1)
        slot, phase = advance(slot, phase)
    return first, second, slot, phase


# --- the end of a tile ----------------------------------------------------------------------------


@gluon.jit
def strips(half):
    """The left and the right strip of an accumulator: other names of its registers."""
    shape: gl.constexpr = (ROWS * gl.num_ctas(), 2, STRIP)
    layout: gl.constexpr = accumulator(gl.num_ctas(), STRIP)
    left, right = gl.split(half.reshape(shape).permute((0, 2, 1)))
    left = gl.convert_layout(left, layout, assert_trivial=True)
    return left, gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def biased(acc, bias_ptr, column, width, BIASED: gl.constexpr):
    if BIASED:
        layout: gl.constexpr = accumulator(gl.num_ctas())
        columns = column + gl.arange(0, HALF, gl.SliceLayout(0, layout))
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
        row += WHICH * ROWS * gl.num_ctas()
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
    smem = allocate(out_desc, CONSUMERS)
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
    leave()


# --- launching ------------------------------------------------------------------------------------


def tiles(rows: int, columns: int, pair: bool = False, cluster: int = 1) -> tuple[int, int]:
    """Rows and columns of tiles of a result; of a cluster's tiles."""
    width = HALF.value * (1 if pair else 2)
    return -(-rows // (CONSUMERS.value * ROWS.value * cluster)), -(-columns // width)


def programs(rows: int, columns: int, device: torch.device, pair: bool = False) -> int:
    """Programs of a cluster: two, but for one row of tiles, and where the last round decides.

    All programs walk in rounds. One of a cluster takes 6/7 of another one's time, by the bytes that
    its copies read from the L2. A row of tiles without a partner is the second program's, empty.
    """
    if not kernels.CLUSTERS or tiles(rows, columns, pair)[0] == 1:
        return 1
    single, double = (
        -(-math.prod(tiles(rows, columns, pair, n)) // (launch.multiprocessors(device) // n))
        for n in (1, 2)
    )
    return 2 if 6 * double <= 7 * single else 1


def trips(terms: int) -> int:
    return -(-terms // TERMS.value)


def grid(tile_rows: int, tile_columns: int, device: torch.device, cluster: int = 1) -> tuple[int]:
    """One program a multiprocessor, if there are as many tiles; of clusters, their number."""
    return (min(tile_rows * tile_columns, launch.multiprocessors(device) // cluster),)


def operand(
    matrix: torch.Tensor, lines: int, k_major: bool | None = None, cluster: int = 1
) -> tuple[TensorDescriptor, bool]:
    """The descriptor of an operand, and whether it is K-major; copied if TMA cannot read it.

    Args:
        matrix: (lines, terms), as a right operand is if it is transposed.
        lines: of a program's box: ROWS of a left operand, HALF of a right one, which the programs
            of a cluster share.
        k_major: how it has to lie, where that is not free.
        cluster: its programs.
    """
    if k_major is None:
        k_major = kernels.reads(matrix) or not kernels.reads(matrix.t())
    there = kernels.readable(matrix if k_major else matrix.t())
    divided = int(lines == ROWS.value)
    box, second = [lines * (cluster if divided else 1), TERMS.value], [divided, 0]
    if not k_major:
        box, second = box[::-1], second[::-1]
    return kernels.descriptor(there, box, second=second if cluster == 2 else None), k_major


def result(matrix: torch.Tensor, cluster: int = 1, columns: int = HALF.value) -> TensorDescriptor:
    """The descriptor of a result, or of a matrix that the end of a tile reads; never copied."""
    second = [1, 0] if cluster == 2 else None
    return kernels.descriptor(matrix, [ROWS.value * cluster, columns], second=second)


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
    cluster = programs(rows, columns, out.device)
    there = tiles(rows, columns, cluster=cluster)
    left_desc, left_lies = operand(left, ROWS.value, cluster=cluster)
    right_desc, right_lies = operand(right.t(), HALF.value, cluster=cluster)
    more_descs, more_terms = (left_desc, right_desc), 0
    if more is not None:
        more_left, _ = operand(more[0], ROWS.value, left_lies, cluster)
        more_right, _ = operand(more[1].t(), HALF.value, right_lies, cluster)
        more_descs, more_terms = (more_left, more_right), more[0].shape[1]
    kernels.launch(
        product_kernel,
        grid(*there, out.device, cluster),
        out if bias is None else bias.contiguous(),  # no kernel reads the stand-in
        left_desc, right_desc, *more_descs, result(out, cluster),
        *there, columns, trips(terms), trips(more_terms),
        LEFT=left_lies, RIGHT=right_lies, MORE=more is not None, BIASED=bias is not None,
        num_ctas=cluster,
    )  # fmt: skip
