"""The `gluon` backend of ffn: the forward's first product on Hopper, finished in one kernel.

    pre = x w1 + b1, hidden = activation(pre)                              kernel
    with a gate also gated = x gate + gate_bias,
    and hidden = activation(gated) pre                                     the same kernel
    out = hidden w2 + b2                                                   ATen

The kernel is persistent: each program, one a multiprocessor, walks through tiles of 192 tokens by
256 hidden features, or by 128 of both weights with a gate. Three consumers, each a warpgroup, have
64 of the tokens; a producer copies 64 terms of the sums at a time by TMA into a ring of shared
memory, and begins the next tile's while the consumers finish this one. A consumer waits for its own
products before it frees a stage: the tensor cores have those of the other two meanwhile.

A trip of the ring reads (192 + 256) 64 elements from the L2 in 1536 clocks of products, 37 bytes a
clock; 128 by 256 would be 48. The backward is the first other kernel's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn import measured
from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import launch
from fastattn.ops.common.gluon import mbarrier, tma
from fastattn.ops.common.matrices import as_rows, columns
from fastattn.ops.common.triton.activations import CUBIC, LINEAR, LOG2_E, SATURATED, SQRT_HALF
from fastattn.ops.ffn.problem import FFNProblem

CONSUMERS = 3
ROWS = 64  # tokens of a consumer
HALF = 128  # columns of each of its two accumulators, 64 registers of a thread
TERMS = 64  # of the sums in a stage; 128 bytes, a row of the swizzle
STAGES = 3  # 168 KB; results on their way out have 48 KB
GROUP = 8  # rows of tiles that are walked through together, column by column
REGISTERS = 160  # of a consumer's thread; the producer's has 24, a multiprocessor 64 K
MAX_SIZE = 2**30  # of a dimension: coordinates are 32-bit


def unsupported(problem: FFNProblem) -> str | None:
    """The reason why the kernel cannot run `problem`, or None."""
    if (reason := kernels.unavailable(problem.device)) is not None:
        return reason
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the Gluon kernel computes in float16 and bfloat16, not in {problem.dtype}"
    sizes = math.prod(problem.x_shape[:-1]), problem.in_features, problem.hidden
    if 0 in sizes:
        return "TMA has no descriptor of an empty tensor"
    if problem.in_features % 8 or problem.hidden % 8:
        return (
            "TMA copies 16 bytes at least: the Gluon kernel needs in_features and hidden in steps "
            f"of 8, and they are {problem.in_features} and {problem.hidden}"
        )
    if max(sizes) > MAX_SIZE:
        return f"a dimension of {max(sizes)} is above 2^30"
    return None


def declined(problem: FFNProblem) -> str | None:
    """The reason why the automatic choice passes the kernel over, until it is measured."""
    if measured.found("gluon", problem):
        return None
    return (
        "a tile of 192 tokens is too much for a few, and it is not measured where it pays: name "
        "backend='gluon' to use it"
    )


def backward_unsupported(problem: FFNProblem) -> str:
    """The reason why another kernel runs the backward of a forward that ran here."""
    return "the Gluon backend of ffn has no backward"


# --- kernel ---------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The constants of the kernel."""

    TRANSPOSED: gl.constexpr  # whether the first weight lies as (hidden, in_features)
    GATE_TRANSPOSED: gl.constexpr  # the second; without a gate it is the first one again
    ACTIVATION: gl.constexpr
    BIASED: gl.constexpr
    GATED: gl.constexpr
    SAVE: gl.constexpr  # whether pre is stored
    CONSUMERS: gl.constexpr
    ROWS: gl.constexpr
    HALF: gl.constexpr
    TERMS: gl.constexpr
    STAGES: gl.constexpr
    GROUP: gl.constexpr


class Sources(NamedTuple):
    """Descriptors of the operands."""

    x: Any
    w: Any
    gate: Any


class Results(NamedTuple):
    """What finishes a tile: pointers of the biases, descriptors of the results."""

    bias: Any
    gate_bias: Any
    hidden: Any
    pre: Any
    gate_pre: Any


class Walk(NamedTuple):
    """The tiles of the result, and the trips of each."""

    rows: Any  # of tiles
    columns: Any
    width: Any  # of the result
    trips: Any


class Ring(NamedTuple):
    """Shared memory of the operands and its barriers; and of the results, a part a consumer."""

    x: Any
    w: Any
    gate: Any
    full: Any
    empty: Any
    out: Any


@gluon.jit
def corner(tile, walk, kind: gl.constexpr):
    """The first row and column of a tile: rows of tiles in groups, column by column in a group."""
    WIDTH: gl.constexpr = kind.HALF if kind.GATED else 2 * kind.HALF
    group = tile // (kind.GROUP * walk.columns)
    within = tile % (kind.GROUP * walk.columns)
    height = gl.minimum(walk.rows - group * kind.GROUP, kind.GROUP)
    row = (group * kind.GROUP + within % height) * (kind.CONSUMERS * kind.ROWS)
    return row, within // height * WIDTH


@gluon.jit
def load_weight(desc, column, term, full, smem, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        tma.async_load(desc, [column, term], full, smem)
    else:
        tma.async_load(desc, [term, column], full, smem)


@gluon.jit
def produce(sources, walk, ring, kind: gl.constexpr):
    BYTES: gl.constexpr = 2 * kind.TERMS * (kind.CONSUMERS * kind.ROWS + 2 * kind.HALF)
    slot = walk.trips * 0
    phase = slot + 1  # the ring begins empty
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        second = column
        if not kind.GATED:
            second += kind.HALF
        for i in range(walk.trips):
            term = i * kind.TERMS
            full = ring.full.index(slot)
            mbarrier.wait(ring.empty.index(slot), phase)
            mbarrier.expect(full, BYTES)
            for c in gl.static_range(kind.CONSUMERS):
                into = ring.x.index(slot * kind.CONSUMERS + c)
                tma.async_load(sources.x, [row + c * kind.ROWS, term], full, into)
            load_weight(sources.w, column, term, full, ring.w.index(slot), kind.TRANSPOSED)
            load_weight(
                sources.gate, second, term, full, ring.gate.index(slot), kind.GATE_TRANSPOSED
            )
            slot, phase = advance(slot, phase, kind)


@gluon.jit
def advance(slot, phase, kind: gl.constexpr):
    slot += 1
    if slot == kind.STAGES:
        slot = slot * 0
        phase ^= 1
    return slot, phase


@gluon.jit
def right(smem, TRANSPOSED: gl.constexpr):
    """A tile of a weight as (terms, columns)."""
    if TRANSPOSED:
        return smem.permute((1, 0))
    else:
        return smem


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp2(x * -LOG2_E))


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """activation(x) of a float32 tile, as ops/common/triton/activations.py has it."""
    if ACTIVATION == "gelu_tanh":
        c = gl.minimum(gl.maximum(x, -SATURATED), SATURATED)
        return x * sigmoid(c * (c * c * CUBIC + LINEAR))
    elif ACTIVATION == "gelu":
        return x * (gl.erf(x * SQRT_HALF) * 0.5 + 0.5)
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    else:
        gl.static_assert(ACTIVATION == "relu", "unknown activation")
        return gl.where(x <= 0.0, 0.0, x)  # NaN stays NaN


@gluon.jit
def biased(acc, bias_ptr, column, width, kind: gl.constexpr, BIASED: gl.constexpr):
    if BIASED:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.HALF, 16])
        columns = column + gl.arange(0, kind.HALF, gl.SliceLayout(0, ACC))
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


@gluon.jit
def finish(acc, second, row, column, results, width, smem, kind: gl.constexpr):
    pre = biased(acc, results.bias, column, width, kind, kind.BIASED)
    if kind.SAVE:
        put(pre, results.pre, row, column, smem)
    if kind.GATED:  # after the store: no more than one bias is in registers
        GATE_BIASED: gl.constexpr = results.gate_bias is not None
        gate_pre = biased(second, results.gate_bias, column, width, kind, GATE_BIASED)
        if kind.SAVE:
            put(gate_pre, results.gate_pre, row, column, smem)
        put(activate(gate_pre, kind.ACTIVATION) * pre, results.hidden, row, column, smem)
    else:
        put(activate(pre, kind.ACTIVATION), results.hidden, row, column, smem)
        column += kind.HALF
        pre = biased(second, results.bias, column, width, kind, kind.BIASED)
        if kind.SAVE:
            put(pre, results.pre, row, column, smem)
        put(activate(pre, kind.ACTIVATION), results.hidden, row, column, smem)


@gluon.jit
def consume(results, walk, ring, kind: gl.constexpr, WHICH: gl.constexpr):
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.HALF, 16])
    slot = walk.trips * 0
    phase = slot
    smem = ring.out.index(WHICH)
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        acc = gl.zeros([kind.ROWS, kind.HALF], gl.float32, ACC)
        second = gl.zeros([kind.ROWS, kind.HALF], gl.float32, ACC)
        for _ in range(walk.trips):
            mbarrier.wait(ring.full.index(slot), phase)
            x = ring.x.index(slot * kind.CONSUMERS + WHICH)
            w = right(ring.w.index(slot), kind.TRANSPOSED)
            gate = right(ring.gate.index(slot), kind.GATE_TRANSPOSED)
            acc = warpgroup_mma(x, w, acc, is_async=True)
            second = warpgroup_mma(x, gate, second, is_async=True)
            acc, second = warpgroup_mma_wait(0, [acc, second])
            mbarrier.arrive(ring.empty.index(slot), count=1)
            slot, phase = advance(slot, phase, kind)
        finish(acc, second, row + WHICH * kind.ROWS, column, results, walk.width, smem, kind)
    tma.store_wait(0)


@gluon.jit
def ffn_forward(
    bias_ptr,  # (hidden,); no matter unless BIASED
    gate_bias_ptr,  # (hidden,) or None
    x_desc,  # of (tokens, in_features)
    w_desc,  # of (hidden, in_features) if TRANSPOSED, else of (in_features, hidden)
    gate_desc,  # the same; without a gate w_desc again
    hidden_desc,  # of (tokens, hidden)
    pre_desc,  # the same, of x w + bias; no matter unless SAVE
    gate_pre_desc,  # of x gate + gate_bias; no matter unless SAVE and GATED
    tile_rows,
    tile_columns,
    hidden,
    trips,
    TRANSPOSED: gl.constexpr,
    GATE_TRANSPOSED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BIASED: gl.constexpr,
    GATED: gl.constexpr,
    SAVE: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    HALF: gl.constexpr,
    TERMS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """pre = x w + bias, hidden = activation(pre); GATED: activation(x gate + gate_bias) pre."""
    gl.static_assert(CONSUMERS == 3, "as many as there are below")
    kind: gl.constexpr = Kind(
        TRANSPOSED, GATE_TRANSPOSED, ACTIVATION, BIASED, GATED, SAVE, CONSUMERS, ROWS, HALF, TERMS,
        STAGES, GROUP,
    )  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, ROWS, TERMS], x_desc.layout)
    w_box: gl.constexpr = [STAGES] + w_desc.block_shape  # noqa: RUF005, which Gluon cannot compile
    gate_box: gl.constexpr = [STAGES] + gate_desc.block_shape  # noqa: RUF005
    w_smem = gl.allocate_shared_memory(dtype, w_box, w_desc.layout)
    gate_smem = gl.allocate_shared_memory(dtype, gate_box, gate_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HALF], hidden_desc.layout)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()  # before the copies see the barriers
    sources = Sources(x_desc, w_desc, gate_desc)
    results = Results(bias_ptr, gate_bias_ptr, hidden_desc, pre_desc, gate_pre_desc)
    walk = Walk(tile_rows, tile_columns, hidden, trips)
    ring = Ring(x_smem, w_smem, gate_smem, full, empty, out_smem)
    gl.warp_specialize(
        [
            (consume, (results, walk, ring, kind, 0)),
            (consume, (results, walk, ring, kind, 1)),
            (consume, (results, walk, ring, kind, 2)),
            (produce, (sources, walk, ring, kind)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


# --- launching ------------------------------------------------------------------------------------


def _right(weight: torch.Tensor) -> tuple[Any, bool]:
    """(descriptor, whether transposed) of a weight (in_features, hidden); copied if need be."""
    transposed = kernels.reads(weight.t())
    there = weight.t() if transposed else kernels.readable(weight)
    return kernels.descriptor(there, [HALF, TERMS] if transposed else [TERMS, HALF]), transposed


def _launch(
    rows: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    hidden: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
) -> None:
    """Fill `hidden`, and `pre` if it is given. The weights are (in_features, hidden)."""
    (tokens, in_features), width = rows.shape, w1.shape[1]
    tile_rows = -(-tokens // (CONSUMERS * ROWS))
    tile_columns = -(-width // (2 * HALF if gate is None else HALF))
    w, transposed = _right(w1)
    gated, gate_transposed = (w, transposed) if gate is None else _right(gate)
    stored = (hidden, hidden) if pre is None else (pre, pre) if gate is None else tuple(pre)
    outs = [kernels.descriptor(x, [ROWS, HALF]) for x in (hidden, *stored)]
    kernels.launch(
        ffn_forward,
        (min(tile_rows * tile_columns, launch.multiprocessors(rows.device)),),
        hidden if b1 is None else b1.contiguous(),  # no kernel reads the stand-in
        None if gate_bias is None else gate_bias.contiguous(),
        kernels.descriptor(kernels.readable(rows), [ROWS, TERMS]), w, gated, *outs,
        tile_rows, tile_columns, width, -(-in_features // TERMS),
        TRANSPOSED=transposed, GATE_TRANSPOSED=gate_transposed, ACTIVATION=activation,
        BIASED=b1 is not None, GATED=gate is not None, SAVE=pre is not None,
        CONSUMERS=CONSUMERS, ROWS=ROWS, HALF=HALF, TERMS=TERMS, STAGES=STAGES,
        GROUP=GROUP, REGISTERS=REGISTERS,
    )  # fmt: skip


def forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    layout: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (..., out_features), and pre if `save_pre`, else without elements.

    pre is (tokens, hidden), with a gate (2, tokens, hidden): before the activation that of w1, then
    that of the gate. A tensor that no descriptor can be made of is copied.
    """
    rows = as_rows(x)
    w1, gate = columns(w1, layout), gate if gate is None else columns(gate, layout)
    shape = rows.shape[0], w1.shape[1]
    hidden = rows.new_empty(shape)
    pre = rows.new_empty((0,) if not save_pre else shape if gate is None else (2, *shape))
    _launch(rows, w1, b1, gate, gate_bias, hidden, pre if save_pre else None, activation)
    if layout == "linear":
        out = F.linear(hidden, w2, b2)
    else:
        out = torch.mm(hidden, w2) if b2 is None else torch.addmm(b2, hidden, w2)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1]), pre
