"""The backward's products on Hopper.

    dpre = (dout w2^T) activation'(pre), hidden = activation(pre),
    and column sums of dpre over every 64 tokens                            one kernel
    db1 = the sums of those, db2 = column sums of dout                      ATen
    dw2 = hidden^T dout, dw1 = x^T dpre, dx = dpre w1^T                     a product each

With a gate

    dpre = (dout w2^T) activation(gated), hidden = activation(gated) pre,
    dgated = (dout w2^T) pre activation'(gated)                             the same kernel
    dgate = x^T dgated                                                      a product
    dx = dpre w1^T + dgated gate^T                                          one product

A tile's end treats 64 columns at a time. A consumer has two tiles of shared memory for it: `pre`
comes into them by TMA, at first under the products, and results leave by them. Each sum over tokens
is one program's, in one order: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products as products
from fastattn.ops.common.gluon import mbarrier, tma
from fastattn.ops.common.gluon_products import (
    CONSUMERS,
    HALF,
    REGISTERS,
    REGISTERS_OF_PRODUCER,
    ROWS,
    STRIP,
    Kind,
    Operands,
    Walk,
    accumulator,
    allocate,
    corner,
    leave,
    make_ring,
    multiply,
    produce,
    put,
    strips,
)
from fastattn.ops.common.matrices import as_rows, columns, gradient_like
from fastattn.ops.ffn.gluon.activations import activation_and_derivative
from fastattn.ops.ffn.gluon.forward import empty_pre, first_product


@gluon.constexpr_function
def sums_layout(programs):
    """Of 64 sums of each program of a cluster."""
    if programs == 1:
        return gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    return gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0], cga_layout=[[1, 0]])


class Results(NamedTuple):
    """What finishes a tile: descriptors of (tokens, hidden), pointers of the sums."""

    pre: Any
    gate_pre: Any
    dpre: Any
    dgate_pre: Any
    hidden: Any
    sums: Any
    gate_sums: Any
    tokens: Any
    width: Any


class Finish(NamedTuple):
    """The constants of a tile's end."""

    ACTIVATION: gl.constexpr
    GATED: gl.constexpr
    HIDDEN: gl.constexpr  # whether the hidden layer is stored
    SUMS: gl.constexpr  # whether column sums are


class Tiles(NamedTuple):
    """Tiles of shared memory, and the barriers of what is copied into them: two a consumer."""

    smem: Any
    ready: Any
    FIRST: gl.constexpr  # of this consumer


@gluon.jit
def fetch(desc, row, column, tiles, WHICH: gl.constexpr):
    """Begin to copy a strip into a tile, once all results have left."""
    BYTES: gl.constexpr = 2 * ROWS * STRIP
    ready = tiles.ready.index(tiles.FIRST + WHICH)
    tma.store_wait(0)
    mbarrier.expect(ready, BYTES)
    tma.async_load(desc, [row, column], ready, tiles.smem.index(tiles.FIRST + WHICH))


@gluon.jit
def fetched(tiles, WHICH: gl.constexpr, PARITY: gl.constexpr):
    """The strip that `fetch` copies into a tile, in float32."""
    mbarrier.wait(tiles.ready.index(tiles.FIRST + WHICH), PARITY)
    layout: gl.constexpr = accumulator(gl.num_ctas(), STRIP)
    return tiles.smem.index(tiles.FIRST + WHICH).load(layout).to(gl.float32)


@gluon.jit
def sum_up(value, sums_ptr, row, column, results):
    """Store the sums of a consumer's rows, of those that there are; each program its own."""
    PROGRAMS: gl.constexpr = gl.num_ctas()
    layout: gl.constexpr = accumulator(PROGRAMS, STRIP)
    lines: gl.constexpr = sums_layout(PROGRAMS)
    rows = row + gl.arange(0, ROWS * PROGRAMS, gl.SliceLayout(1, layout))
    there = gl.where((rows < results.tokens)[:, None], value, 0.0)
    sums = gl.convert_layout(gl.sum(there.reshape((PROGRAMS, ROWS, STRIP)), 1), lines)
    part = row // ROWS + gl.arange(0, PROGRAMS, gl.SliceLayout(1, lines))
    columns = (column + gl.arange(0, STRIP, gl.SliceLayout(0, lines)))[None, :]
    at = part.to(gl.int64)[:, None] * results.width + columns
    gl.store(sums_ptr + at, sums, mask=columns < results.width)


@gluon.jit
def end(value, desc, sums_ptr, row, column, results, tiles, do: gl.constexpr, WHICH: gl.constexpr):
    put(value, desc, row, column, tiles.smem.index(tiles.FIRST + WHICH))
    if do.SUMS:
        sum_up(value.to(gl.float32), sums_ptr, row, column, results)


@gluon.jit
def begin(row, column, results, tiles, do: gl.constexpr):
    """Fetch what the first strip needs, or without a gate the first two."""
    if do.GATED:
        fetch(results.gate_pre, row, column, tiles, 0)
        fetch(results.pre, row, column, tiles, 1)
    else:
        fetch(results.pre, row, column, tiles, 0)
        fetch(results.pre, row, column + STRIP, tiles, 1)


@gluon.jit
def finish(dhidden, row, column, results, tiles, do: gl.constexpr, PLACE: gl.constexpr):
    """A strip's results from the gradient of the hidden layer; PLACE: its number in the tile."""
    column += PLACE * STRIP
    LAST: gl.constexpr = 2 * HALF // STRIP - 1
    dtype: gl.constexpr = results.dpre.dtype  # rounded at once, for want of registers
    if do.GATED:
        gate_pre = fetched(tiles, 0, PLACE % 2)
        pre = fetched(tiles, 1, PLACE % 2)
        activated, derivative = activation_and_derivative(gate_pre, do.ACTIVATION)
        dgate_pre = (dhidden * pre * derivative).to(dtype)
        dpre = (dhidden * activated).to(dtype)
        hidden = (activated * pre).to(dtype)
        end(dgate_pre, results.dgate_pre, results.gate_sums, row, column, results, tiles, do, 1)
        end(dpre, results.dpre, results.sums, row, column, results, tiles, do, 0)
        if do.HIDDEN:
            put(hidden, results.hidden, row, column, tiles.smem.index(tiles.FIRST))
        if PLACE < LAST:
            begin(row, column + STRIP, results, tiles, do)
    else:
        MINE: gl.constexpr = PLACE % 2
        pre = fetched(tiles, MINE, PLACE // 2)
        activated, derivative = activation_and_derivative(pre, do.ACTIVATION)
        dpre = (dhidden * derivative).to(dtype)
        hidden = activated.to(dtype)
        end(dpre, results.dpre, results.sums, row, column, results, tiles, do, MINE)
        if do.HIDDEN:
            put(hidden, results.hidden, row, column, tiles.smem.index(tiles.FIRST + MINE))
        if PLACE < LAST - 1:
            fetch(results.pre, row, column + 2 * STRIP, tiles, MINE)


@gluon.jit
def consume(
    results, walk, ring, smem, ready, kind: gl.constexpr, do: gl.constexpr, WHICH: gl.constexpr
):
    slot = walk.trips * 0
    phase = slot
    tiles = Tiles(smem, ready, 2 * WHICH)
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        row += WHICH * ROWS * gl.num_ctas()
        begin(row, column, results, tiles, do)
        first, second, slot, phase = multiply(walk, ring, slot, phase, kind, WHICH)
        left, right = strips(first)
        finish(left, row, column, results, tiles, do, 0)
        finish(right, row, column, results, tiles, do, 1)
        left, right = strips(second)
        finish(left, row, column, results, tiles, do, 2)
        finish(right, row, column, results, tiles, do, 3)
    tma.store_wait(0)


@gluon.jit
def ffn_backward(
    sums_ptr,  # (rows of 64 tokens, hidden), float32, of dpre; no matter unless SUMS
    gate_sums_ptr,  # the same, of dgate_pre; no matter unless SUMS and GATED
    dout_desc,  # of (tokens, out_features), or the transpose unless DOUT
    w_desc,  # of (hidden, out_features), or the transpose unless W
    pre_desc,  # of (tokens, hidden)
    gate_pre_desc,  # the same; no matter unless GATED
    dpre_desc,  # the same
    dgate_pre_desc,  # the same; no matter unless GATED
    hidden_desc,  # the same; no matter unless HIDDEN
    tile_rows,
    tile_columns,
    tokens,
    width,
    trips,
    DOUT: gl.constexpr,
    W: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    HIDDEN: gl.constexpr,
    SUMS: gl.constexpr,
):
    """dpre = (dout w) activation'(pre), hidden = activation(pre), sums of dpre.

    GATED: dpre = (dout w) activation(gate_pre), dgate_pre = (dout w) pre activation'(gate_pre),
    hidden = activation(gate_pre) pre.
    """
    kind: gl.constexpr = Kind(DOUT, W, W, False, False)
    do: gl.constexpr = Finish(ACTIVATION, GATED, HIDDEN, SUMS)
    operands = Operands(dout_desc, w_desc, w_desc)
    results = Results(
        pre_desc, gate_pre_desc, dpre_desc, dgate_pre_desc, hidden_desc, sums_ptr, gate_sums_ptr,
        tokens, width,
    )  # fmt: skip
    walk = Walk(tile_rows, tile_columns, width, trips, 0)
    smem = allocate(pre_desc, 2 * CONSUMERS)
    ready = mbarrier.allocate_mbarrier(batch=2 * CONSUMERS)
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.init(ready.index(i), count=1)
    ring = make_ring(operands)  # whose fence is after these barriers too
    gl.warp_specialize(
        [
            (consume, (results, walk, ring, smem, ready, kind, do, 0)),
            (consume, (results, walk, ring, smem, ready, kind, do, 1)),
            (consume, (results, walk, ring, smem, ready, kind, do, 2)),
            (produce, (operands, operands, walk, ring, kind)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS_OF_PRODUCER],
    )
    leave()


def derivative(
    drows: torch.Tensor,
    w2: torch.Tensor,
    pre: torch.Tensor,
    need_hidden: bool,
    need_sums: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, dpre, sums) of dout (tokens, out_features), w2 (hidden, out_features) and pre.

    dpre is as pre, and sums (..., parts, hidden) in float32; the first and the last mean nothing
    unless they are needed.
    """
    gated = pre.dim() == 3
    tokens, width = pre.shape[-2:]
    dpre = torch.empty_like(pre)
    hidden = pre.new_empty(pre.shape[-2:]) if need_hidden else dpre
    cluster = products.programs(tokens, width, pre.device)
    tiles = products.tiles(tokens, width, cluster=cluster)
    parts = (*pre.shape[:-2], tiles[0] * CONSUMERS.value * cluster, width)
    sums = pre.new_empty(parts, dtype=torch.float32) if need_sums else dpre
    dout_desc, dout_lies = products.operand(drows, ROWS.value, cluster=cluster)
    w_desc, w_lies = products.operand(w2, HALF.value, cluster=cluster)
    both, into = (pre, dpre) if gated else ((pre, pre), (dpre, dpre))
    stored = (*both, *into, hidden if need_hidden else into[0])  # no kernel reads the stand-ins
    descs = (products.result(matrix, cluster, STRIP.value) for matrix in stored)
    kernels.launch(
        ffn_backward,
        products.grid(*tiles, pre.device, cluster),
        *(sums if gated else (sums, sums)),
        dout_desc, w_desc, *descs,
        *tiles, tokens, width, products.trips(drows.shape[1]),
        DOUT=dout_lies, W=w_lies, ACTIVATION=activation, GATED=gated, HIDDEN=need_hidden,
        SUMS=need_sums, num_ctas=cluster,
    )  # fmt: skip
    return hidden, dpre, sums


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    pre: torch.Tensor | None,
    needs: tuple[bool, ...],
    activation: str,
    layout: str,
) -> tuple[torch.Tensor, ...]:
    """dx, dw1, db1, dw2, db2, dgate, dgate_bias; those that `needs` leaves out have no elements.

    `pre` is None if the forward did not save it.
    """
    need_dx, need_dw1, need_db1, need_dw2, need_db2, need_dgate, need_dgate_bias = needs
    dx = dw1 = db1 = dw2 = db2 = dgate = dgate_bias = None
    drows = as_rows(dout)
    if need_db2:
        db2 = _sums(drows, x.dtype)
    if need_dx or need_dw1 or need_db1 or need_dw2 or need_dgate or need_dgate_bias:
        rows, into = as_rows(x), columns(w1, layout)
        gate_into = gate if gate is None else columns(gate, layout)
        if pre is None:
            pre = empty_pre(rows, into, gate_into)
            first_product(rows, into, b1, gate_into, gate_bias, None, pre, activation)
        hidden, dpre, sums = derivative(
            drows,
            columns(w2, layout),
            pre.contiguous(),
            need_dw2,
            need_db1 or need_dgate_bias,
            activation,
        )
        more = None
        if gate is not None and gate_into is not None:
            (dpre, dgate_pre), (sums, gate_sums) = dpre, sums
            more = dgate_pre, gate_into.t()
            if need_dgate:
                dgate = _weight_gradient(gate, layout, rows, dgate_pre)
            if need_dgate_bias:
                dgate_bias = _sums(gate_sums, x.dtype)
        if need_dx:
            dx = rows.new_empty(rows.shape)
            products.product(dx, dpre, into.t(), more=more)
            dx = dx.view(x.shape)
        if need_dw1:
            dw1 = _weight_gradient(w1, layout, rows, dpre)
        if need_db1:
            db1 = _sums(sums, x.dtype)
        if need_dw2:
            dw2 = _weight_gradient(w2, layout, hidden, drows)
    gradients = dx, dw1, db1, dw2, db2, dgate, dgate_bias
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _sums(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums of the columns, added in float32."""
    return matrix.sum(0, dtype=torch.float32).to(dtype)


def _weight_gradient(
    weight: torch.Tensor, layout: str, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """left^T right, (in, out), as the gradient of `weight`, written as it lies in memory."""
    gradient = gradient_like(weight)
    there = columns(gradient, layout)
    if there.is_contiguous():
        products.product(there, left.t(), right)
    else:
        products.product(there.t(), right.t(), left)
    return gradient
