"""activation(x w + bias) in one pass, and with a gate activation(x gate + gate_bias) (x w + bias).

The bias is added and the activation applied while the product is in registers. The sum before the
activation is stored for a backward, or nothing but it. Another number of tokens compiles nothing
new, but for the three tiles that it may choose from (tiles.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.common import launch
from fastattn.ops.common.triton.activations import activation_and_derivative
from fastattn.ops.common.triton.products import (
    GATED_STRIP,
    STRIP,
    blocks,
    halves,
    products,
    tile_of,
    tile_of_program,
)


@triton.jit
def _finish_forward(
    product,  # (BLOCK_M, WIDTH), float32
    gate_product,  # the same
    first_col,
    bias_ptr,
    gate_bias_ptr,
    activated_ptr,  # (height, hidden), from this row of tiles on
    pre_ptr,  # the same
    gate_pre_ptr,  # the same
    height,
    hidden,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    STORE_ACTIVATED: tl.constexpr,
    STORE_PRE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if WIDTH > STRIP or (GATED and WIDTH > GATED_STRIP):
        left, right = halves(product, BLOCK_M, WIDTH)
        gate_left, gate_right = left, right
        if GATED:
            gate_left, gate_right = halves(gate_product, BLOCK_M, WIDTH)
        _finish_forward(
            left, gate_left, first_col, bias_ptr, gate_bias_ptr, activated_ptr, pre_ptr,
            gate_pre_ptr, height, hidden, ACTIVATION, GATED, HAS_BIAS, HAS_GATE_BIAS,
            STORE_ACTIVATED, STORE_PRE, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
        _finish_forward(
            right, gate_right, first_col + WIDTH // 2, bias_ptr, gate_bias_ptr, activated_ptr,
            pre_ptr, gate_pre_ptr, height, hidden, ACTIVATION, GATED, HAS_BIAS, HAS_GATE_BIAS,
            STORE_ACTIVATED, STORE_PRE, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, WIDTH)
        rows = tl.arange(0, BLOCK_M)
        offsets = rows[:, None] * hidden + cols[None, :]
        inside = (rows < height)[:, None] & (cols < hidden)[None, :]
        pre = product
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=cols < hidden, other=0.0)
            pre += bias.to(tl.float32)[None, :]
        if STORE_PRE:
            tl.store(pre_ptr + offsets, pre.to(pre_ptr.dtype.element_ty), mask=inside)
        if GATED:
            gate_pre = gate_product
            if HAS_GATE_BIAS:
                bias = tl.load(gate_bias_ptr + cols, mask=cols < hidden, other=0.0)
                gate_pre += bias.to(tl.float32)[None, :]
            if STORE_PRE:
                rounded = gate_pre.to(gate_pre_ptr.dtype.element_ty)
                tl.store(gate_pre_ptr + offsets, rounded, mask=inside)
        if STORE_ACTIVATED:
            if GATED:
                activated, _ = activation_and_derivative(gate_pre, ACTIVATION)
                activated *= pre
            else:
                activated, _ = activation_and_derivative(pre, ACTIVATION)
            activated = activated.to(activated_ptr.dtype.element_ty)
            tl.store(activated_ptr + offsets, activated, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x_ptr,  # (tokens, in_features)
    w_ptr,  # (in_features, hidden)
    bias_ptr,  # (hidden,)
    gate_ptr,  # (in_features, hidden); None, as its bias, unless GATED
    gate_bias_ptr,  # (hidden,)
    activated_ptr,  # (tokens, hidden), contiguous
    pre_ptr,  # (tokens, hidden), contiguous; GATED: (2, tokens, hidden)
    stride_x,
    stride_wk,
    stride_wn,
    stride_gk,
    stride_gn,
    tokens,
    hidden,
    in_features,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    STORE_ACTIVATED: tl.constexpr,
    STORE_PRE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """pre = x w + bias, activated = activation(pre), either or both.

    GATED: pre[0] is that, pre[1] = x gate + gate_bias, activated = activation(pre[1]) pre[0].
    """
    tile_m, tile_n = tile_of_program(tokens, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again and are not stored.
    product, gate_product = products(
        x_ptr, w_ptr, gate_ptr, tl.minimum(rows, tokens - 1), cols, stride_x, stride_wk, stride_wn,
        stride_gk, stride_gn, hidden, in_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, GATED,
    )  # fmt: skip
    first = tile_m.to(tl.int64) * BLOCK_M * hidden
    second = first + tl.cast(tokens, tl.int64) * hidden
    _finish_forward(
        product, gate_product, tile_n * BLOCK_N, bias_ptr, gate_bias_ptr, activated_ptr + first,
        pre_ptr + first, pre_ptr + second, tokens - tile_m * BLOCK_M, hidden, ACTIVATION, GATED,
        HAS_BIAS, HAS_GATE_BIAS, STORE_ACTIVATED, STORE_PRE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def empty_pre(rows: torch.Tensor, w1: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    shape = rows.shape[0], w1.shape[1]
    return rows.new_empty(shape if gate is None else (2, *shape))


def launch_forward(
    rows: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activated: torch.Tensor | None,
    pre: torch.Tensor | None,
    activation: str,
) -> None:
    """Fill `activated` and `pre`, those that are given."""
    (tokens, in_features), hidden = rows.shape, w1.shape[1]
    tile = tile_of(rows, w1, gate)
    launch.launch(
        _forward_kernel,
        (tile.programs(tokens, hidden),),
        rows,
        w1,
        rows if b1 is None else b1.contiguous(),  # a kernel reads no stand-in
        gate,
        None if gate_bias is None else gate_bias.contiguous(),
        rows if activated is None else activated,
        rows if pre is None else pre,
        rows.stride(0),
        *w1.stride(),
        *((1, 1) if gate is None else gate.stride()),  # 1 is a constant, so no parameter is left
        tokens,
        hidden,
        in_features,
        ACTIVATION=activation,
        GATED=gate is not None,
        HAS_BIAS=b1 is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        STORE_ACTIVATED=activated is not None,
        STORE_PRE=pre is not None,
        **blocks(tile, hidden, in_features),
    )
