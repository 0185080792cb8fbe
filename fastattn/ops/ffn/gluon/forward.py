"""The forward's products on Hopper.

    pre = x w1 + b1, hidden = activation(pre)                   one kernel
    with a gate also gated = x gate + gate_bias,
    and hidden = activation(gated) pre                          in the same one
    out = hidden w2 + b2                                        a product

A tile of the first is 192 tokens by 256 hidden features, or by 128 of both weights with a gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products as products
from fastattn.ops.common.gluon import tma
from fastattn.ops.common.gluon_products import (
    CONSUMERS,
    HALF,
    REGISTERS,
    REGISTERS_OF_PRODUCER,
    ROWS,
    Kind,
    Operands,
    Walk,
    allocate,
    biased,
    corner,
    leave,
    make_ring,
    multiply,
    produce,
    put,
)
from fastattn.ops.common.matrices import as_rows, columns
from fastattn.ops.ffn.gluon.activations import activation_and_derivative


class Results(NamedTuple):
    """What finishes a tile: pointers of the biases, descriptors of the results."""

    bias: Any
    gate_bias: Any
    hidden: Any
    pre: Any
    gate_pre: Any


class Finish(NamedTuple):
    """The constants of a tile's end."""

    ACTIVATION: gl.constexpr
    BIASED: gl.constexpr
    GATED: gl.constexpr
    GATE_BIASED: gl.constexpr
    SAVE: gl.constexpr  # whether pre is stored
    HIDDEN: gl.constexpr  # whether the hidden layer is


@gluon.jit
def put_hidden(pre, factor, desc, row, column, smem, do: gl.constexpr):
    if do.HIDDEN:
        activated, _ = activation_and_derivative(pre, do.ACTIVATION)
        if do.GATED:
            activated *= factor
        put(activated, desc, row, column, smem)


@gluon.jit
def finish(first, second, row, column, results, width, smem, do: gl.constexpr):
    pre = biased(first, results.bias, column, width, do.BIASED)
    if do.SAVE:
        put(pre, results.pre, row, column, smem)
    if do.GATED:  # after the store: no more than one bias is in registers
        gate_pre = biased(second, results.gate_bias, column, width, do.GATE_BIASED)
        if do.SAVE:
            put(gate_pre, results.gate_pre, row, column, smem)
        put_hidden(gate_pre, pre, results.hidden, row, column, smem, do)
    else:
        put_hidden(pre, None, results.hidden, row, column, smem, do)
        column += HALF
        pre = biased(second, results.bias, column, width, do.BIASED)
        if do.SAVE:
            put(pre, results.pre, row, column, smem)
        put_hidden(pre, None, results.hidden, row, column, smem, do)


@gluon.jit
def consume(results, walk, ring, smem, kind: gl.constexpr, do: gl.constexpr, WHICH: gl.constexpr):
    slot = walk.trips * 0
    phase = slot
    mine = smem.index(WHICH)
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        row += WHICH * ROWS * gl.num_ctas()
        first, second, slot, phase = multiply(walk, ring, slot, phase, kind, WHICH)
        finish(first, second, row, column, results, walk.width, mine, do)
    tma.store_wait(0)


@gluon.jit
def ffn_forward(
    bias_ptr,  # (hidden,); no matter unless BIASED
    gate_bias_ptr,  # (hidden,); no matter unless GATE_BIASED
    x_desc,  # of (tokens, in_features), or the transpose unless X
    w_desc,  # of (hidden, in_features), or the transpose unless W
    gate_desc,  # the same, unless GATE; without a gate w_desc again
    hidden_desc,  # of (tokens, hidden); no matter unless HIDDEN
    pre_desc,  # the same, of x w + bias; no matter unless SAVE
    gate_pre_desc,  # of x gate + gate_bias; no matter unless SAVE and GATED
    tile_rows,
    tile_columns,
    hidden,
    trips,
    X: gl.constexpr,
    W: gl.constexpr,
    GATE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BIASED: gl.constexpr,
    GATED: gl.constexpr,
    GATE_BIASED: gl.constexpr,
    SAVE: gl.constexpr,
    HIDDEN: gl.constexpr,
):
    """pre = x w + bias, hidden = activation(pre); GATED: activation(x gate + gate_bias) pre."""
    kind: gl.constexpr = Kind(X, W, GATE, GATED, False)
    do: gl.constexpr = Finish(ACTIVATION, BIASED, GATED, GATE_BIASED, SAVE, HIDDEN)
    operands = Operands(x_desc, w_desc, gate_desc)
    results = Results(bias_ptr, gate_bias_ptr, hidden_desc, pre_desc, gate_pre_desc)
    walk = Walk(tile_rows, tile_columns, hidden, trips, 0)
    ring = make_ring(operands)
    smem = allocate(hidden_desc, CONSUMERS)
    gl.warp_specialize(
        [
            (consume, (results, walk, ring, smem, kind, do, 0)),
            (consume, (results, walk, ring, smem, kind, do, 1)),
            (consume, (results, walk, ring, smem, kind, do, 2)),
            (produce, (operands, operands, walk, ring, kind)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS_OF_PRODUCER],
    )
    leave()


def first_product(
    rows: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    hidden: torch.Tensor | None,
    pre: torch.Tensor | None,
    activation: str,
) -> None:
    """Fill `hidden` and `pre`, those that are given. The weights are (in_features, hidden)."""
    width, pair = w1.shape[1], gate is not None
    cluster = products.programs(rows.shape[0], width, rows.device, pair)
    x, x_lies = products.operand(rows, ROWS.value, cluster=cluster)
    w, w_lies = gated, gate_lies = products.operand(w1.t(), HALF.value, cluster=cluster)
    if gate is not None:
        gated, gate_lies = products.operand(gate.t(), HALF.value, cluster=cluster)
    saved = (pre, pre) if gate is None else (None, None) if pre is None else tuple(pre)
    results = [x for x in (hidden, *saved) if x is not None]
    stored = [results[0] if x is None else x for x in (hidden, *saved)]  # no kernel reads stand-ins
    descs = (products.result(matrix, cluster) for matrix in stored)
    tiles = products.tiles(rows.shape[0], width, pair, cluster)
    kernels.launch(
        ffn_forward,
        products.grid(*tiles, rows.device, cluster),
        rows if b1 is None else b1.contiguous(),
        rows if gate_bias is None else gate_bias.contiguous(),
        x, w, gated, *descs, *tiles, width, products.trips(rows.shape[1]),
        X=x_lies, W=w_lies, GATE=gate_lies, ACTIVATION=activation, BIASED=b1 is not None,
        GATED=pair, GATE_BIASED=gate_bias is not None, SAVE=pre is not None,
        HIDDEN=hidden is not None, num_ctas=cluster,
    )  # fmt: skip


def empty_pre(rows: torch.Tensor, w1: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Memory for pre: (tokens, hidden), with a gate (2, tokens, hidden)."""
    shape = rows.shape[0], w1.shape[1]
    return rows.new_empty(shape if gate is None else (2, *shape))


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
    w1, w2 = columns(w1, layout), columns(w2, layout)
    gate = gate if gate is None else columns(gate, layout)
    hidden = rows.new_empty((rows.shape[0], w1.shape[1]))
    pre = empty_pre(rows, w1, gate) if save_pre else None
    first_product(rows, w1, b1, gate, gate_bias, hidden, pre, activation)
    out = rows.new_empty((rows.shape[0], w2.shape[1]))
    products.product(out, hidden, w2, b2)
    pre = rows.new_empty(0) if pre is None else pre
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1]), pre
