"""The `triton` backend of ffn: the products with something to fuse, the others left to ATen.

    forward     pre = x w1 + b1, hidden = activation(pre)                 kernel
                out = hidden w2 + b2                                      ATen
    backward    dpre = (dout w2^T) activation'(pre), hidden again,        kernel
                and column sums of dpre over each tile's tokens
                db1 = the sums of those, db2 = column sums of dout        kernel
                dw2 = hidden^T dout, dw1 = x^T dpre, dx = dpre w1^T       ATen

With a gate the kernels are these, GATED, and ATen has two products more:

    forward     up = x w1 + b1, gated = x gate + gate_bias, both in one kernel
                hidden = activation(gated) up
    backward    dup = (dout w2^T) activation(gated)
                dgated = (dout w2^T) up activation'(gated)
                dgate = x^T dgated, dx = dup w1^T + dgated gate^T

The forward's kernel, and the product in the backward's, are those of ops/common/triton. The weights
are read as (in, out) views: both layouts are one kernel with other strides. No atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastattn.ops.common import launch
from fastattn.ops.common import triton as of_kernels
from fastattn.ops.common.matrices import as_rows, columns, gradient_like
from fastattn.ops.common.triton.activated import empty_pre, launch_forward
from fastattn.ops.common.triton.activations import activation_and_derivative
from fastattn.ops.common.triton.column_sums import column_sums
from fastattn.ops.common.triton.products import (
    GATED_STRIP,
    MAX_COLUMNS,
    STRIP,
    blocks,
    halves,
    products,
    tile_of,
    tile_of_program,
)
from fastattn.ops.ffn.problem import FFNProblem


def unsupported(problem: FFNProblem) -> str | None:
    if problem.hidden > MAX_COLUMNS:
        return f"hidden {problem.hidden} is above {MAX_COLUMNS}"
    return of_kernels.unsupported(problem)


# --- forward ------------------------------------------------------------------------------------


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
    that of the gate.
    """
    rows = as_rows(x)
    w1, gate = columns(w1, layout), gate if gate is None else columns(gate, layout)
    shape = (rows.shape[0], w1.shape[1])
    activated = rows.new_empty(shape)
    pre = empty_pre(rows, w1, gate) if save_pre else rows.new_empty(0)
    launch_forward(rows, w1, b1, gate, gate_bias, activated, pre if save_pre else None, activation)
    if layout == "linear":
        out = F.linear(activated, w2, b2)
    else:
        out = torch.mm(activated, w2) if b2 is None else torch.addmm(b2, activated, w2)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1]), pre


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _finish_backward(
    dactivated,  # (BLOCK_M, WIDTH), float32
    first_col,
    pre_ptr,  # (height, hidden), from this row of tiles on
    gate_pre_ptr,  # the same
    activated_ptr,  # the same
    dpre_ptr,  # the same
    dgate_pre_ptr,  # the same
    sums_ptr,  # (hidden,), of this row of tiles
    gate_sums_ptr,  # the same
    height,
    hidden,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    STORE_ACTIVATED: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if WIDTH > STRIP or (GATED and WIDTH > GATED_STRIP):
        left, right = halves(dactivated, BLOCK_M, WIDTH)
        _finish_backward(
            left, first_col, pre_ptr, gate_pre_ptr, activated_ptr, dpre_ptr, dgate_pre_ptr,
            sums_ptr, gate_sums_ptr, height, hidden, ACTIVATION, GATED, STORE_ACTIVATED, STORE_SUMS,
            BLOCK_M, WIDTH // 2,
        )  # fmt: skip
        _finish_backward(
            right, first_col + WIDTH // 2, pre_ptr, gate_pre_ptr, activated_ptr, dpre_ptr,
            dgate_pre_ptr, sums_ptr, gate_sums_ptr, height, hidden, ACTIVATION, GATED,
            STORE_ACTIVATED, STORE_SUMS, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, WIDTH)
        rows = tl.arange(0, BLOCK_M)
        offsets = rows[:, None] * hidden + cols[None, :]
        inside = (rows < height)[:, None] & (cols < hidden)[None, :]
        pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate_pre = tl.load(gate_pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            activated, derivative = activation_and_derivative(gate_pre, ACTIVATION)
            dgate_pre = dactivated * pre * derivative
            dpre = dactivated * activated
            activated *= pre
            rounded = dgate_pre.to(dgate_pre_ptr.dtype.element_ty)
            tl.store(dgate_pre_ptr + offsets, rounded, mask=inside)
        else:
            activated, derivative = activation_and_derivative(pre, ACTIVATION)
            dpre = dactivated * derivative
        tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        if STORE_ACTIVATED:
            activated = activated.to(activated_ptr.dtype.element_ty)
            tl.store(activated_ptr + offsets, activated, mask=inside)
        if STORE_SUMS:
            sums = tl.sum(tl.where(inside, dpre, 0.0), 0)
            tl.store(sums_ptr + cols, sums, mask=cols < hidden)
            if GATED:
                sums = tl.sum(tl.where(inside, dgate_pre, 0.0), 0)
                tl.store(gate_sums_ptr + cols, sums, mask=cols < hidden)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    dout_ptr,  # (tokens, out_features)
    w_ptr,  # (out_features, hidden), the second weight transposed
    pre_ptr,  # (tokens, hidden), contiguous; GATED: (2, tokens, hidden)
    activated_ptr,  # (tokens, hidden), contiguous
    dpre_ptr,  # as pre
    sums_ptr,  # (tiles of tokens, hidden), float32, contiguous; GATED: (2, tiles, hidden)
    stride_dout,
    stride_wk,
    stride_wn,
    tokens,
    hidden,
    out_features,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    STORE_ACTIVATED: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dpre = (dout w) activation'(pre); activated = activation(pre); sums = dpre over the tile.

    GATED: dpre[0] = (dout w) activation(pre[1]), dpre[1] = (dout w) pre[0] activation'(pre[1]),
    activated = activation(pre[1]) pre[0].
    """
    tile_m, tile_n = tile_of_program(tokens, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    product, _ = products(
        dout_ptr, w_ptr, None, tl.minimum(rows, tokens - 1), cols, stride_dout, stride_wk,
        stride_wn, 1, 1, hidden, out_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, False,
    )  # fmt: skip
    first = tile_m.to(tl.int64) * BLOCK_M * hidden
    second = first + tl.cast(tokens, tl.int64) * hidden
    sums_ptr += tile_m.to(tl.int64) * hidden
    gate_sums_ptr = sums_ptr + tl.cdiv(tokens, BLOCK_M).to(tl.int64) * hidden
    _finish_backward(
        product, tile_n * BLOCK_N, pre_ptr + first, pre_ptr + second, activated_ptr + first,
        dpre_ptr + first, dpre_ptr + second, sums_ptr, gate_sums_ptr, tokens - tile_m * BLOCK_M,
        hidden, ACTIVATION, GATED, STORE_ACTIVATED, STORE_SUMS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


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
        db2 = column_sums(drows, x.dtype)
    if need_dx or need_dw1 or need_db1 or need_dw2 or need_dgate or need_dgate_bias:
        rows, into = as_rows(x), columns(w1, layout)
        gate_into = gate if gate is None else columns(gate, layout)
        activated, dpre, sums = _launch_backward(
            drows, rows, into, b1, columns(w2, layout), gate_into, gate_bias, pre, need_dw2,
            need_db1 or need_dgate_bias, activation,
        )  # fmt: skip
        if gate is not None:
            (dpre, dgate_pre), (sums, gate_sums) = dpre, sums
            if need_dgate:
                dgate = _weight_gradient(gate, layout, rows, dgate_pre)
            if need_dgate_bias:
                dgate_bias = column_sums(gate_sums, x.dtype)
        if need_dx:
            dx = torch.mm(dpre, into.t())
            if gate_into is not None:
                dx.addmm_(dgate_pre, gate_into.t())
            dx = dx.view(x.shape)
        if need_dw1:
            dw1 = _weight_gradient(w1, layout, rows, dpre)
        if need_db1:
            db1 = column_sums(sums, x.dtype)
        if need_dw2:
            dw2 = _weight_gradient(w2, layout, activated, drows)
    gradients = dx, dw1, db1, dw2, db2, dgate, dgate_bias
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _weight_gradient(
    weight: torch.Tensor, layout: str, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """left^T right, (in, out), as the gradient of `weight`."""
    gradient = gradient_like(weight)
    torch.mm(left.t(), right, out=columns(gradient, layout))
    return gradient


def _launch_backward(
    drows: torch.Tensor,
    rows: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    pre: torch.Tensor | None,
    need_activated: bool,
    need_sums: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(activated, dpre, sums); the first and the last mean nothing unless they are needed."""
    (tokens, out_features), hidden = drows.shape, w2.shape[0]
    tile = tile_of(drows, w2.t())
    if pre is None:
        pre = empty_pre(rows, w1, gate)
        launch_forward(rows, w1, b1, gate, gate_bias, None, pre, activation)
    dpre = torch.empty_like(pre)
    activated = rows.new_empty(pre.shape[-2:]) if need_activated else pre
    sums = pre
    if need_sums:
        shape = (*pre.shape[:-2], triton.cdiv(tokens, tile.block_m), hidden)
        sums = rows.new_empty(shape, dtype=torch.float32)
    launch.launch(
        _backward_kernel,
        (tile.programs(tokens, hidden),),
        drows,
        w2,
        pre,
        activated,
        dpre,
        sums,
        drows.stride(0),
        w2.stride(1),
        w2.stride(0),
        tokens,
        hidden,
        out_features,
        ACTIVATION=activation,
        GATED=gate is not None,
        STORE_ACTIVATED=need_activated,
        STORE_SUMS=need_sums,
        **blocks(tile, hidden, out_features),
    )
    return activated, dpre, sums
