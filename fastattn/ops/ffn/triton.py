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

The weights are read as (in, out) views: both layouts are one kernel with other strides. Any size;
float16, bfloat16 and float32; sums in float32, float32 operands multiplied as such (IEEE, no TF32).
No atomics. Another number of tokens compiles nothing new, but for the three tiles that it may
choose from (tiles.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastattn import backends
from fastattn.ops.common import launch
from fastattn.ops.ffn import tiles
from fastattn.ops.ffn.matrices import as_rows, columns, gradient_like
from fastattn.ops.ffn.problem import FFNProblem

# Offsets inside a tile are 32-bit; a tile has at most 128 rows (tiles.py).
MAX_HIDDEN = 2**31 // 128 - 1


def unsupported(problem: FFNProblem) -> str | None:
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype == torch.float64:
        return "the Triton kernels compute in float32; torch and reference do float64"
    if problem.dtype == torch.bfloat16 and backends.triton_runs() == "interpreted":
        return "Triton's interpreter computes bfloat16 dots wrong"
    if problem.hidden > MAX_HIDDEN:
        return f"hidden {problem.hidden} is above {MAX_HIDDEN}"
    return None


# --- the activations ----------------------------------------------------------------------------

# Constants stand on the right of a tensor: on the left they would swallow it in the interpreter.
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# gelu_tanh(x) = x sigmoid(LINEAR x + CUBIC x^3), for (1 + tanh u) / 2 = sigmoid(2 u):
LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.07135481627260025)  # 0.044715 LINEAR
THREE_CUBIC = tl.constexpr(0.21406444881780073)
# Beyond it that sigmoid is 0 or 1 in float32; its argument is kept finite.
SATURATED = tl.constexpr(16.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def _activation_and_derivative(x, ACTIVATION: tl.constexpr):
    """activation(x) and activation'(x) of a float32 block; (x s(z))' = s + x s (1 - s) z'.

    A kernel that uses the first alone does not compute the second.
    """
    if ACTIVATION == "gelu_tanh":
        c = tl.minimum(tl.maximum(x, -SATURATED), SATURATED)
        s = _sigmoid(c * (c * c * CUBIC + LINEAR))
        return x * s, s + x * s * (1.0 - s) * (c * c * THREE_CUBIC + LINEAR)
    elif ACTIVATION == "gelu":
        cdf = tl.erf(x * SQRT_HALF) * 0.5 + 0.5
        return x * cdf, cdf + x * tl.exp2(x * x * (-0.5 * LOG2_E)) * ONE_OVER_SQRT_2_PI
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        return x * s, s + x * s * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)  # NaN stays NaN


# --- the matrix product -------------------------------------------------------------------------


@triton.jit
def _tile_of_program(
    m_size, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """(row, column) of this program's tile: GROUP_M rows of tiles are walked column by column.

    For GROUP_M = 2:    0 2 4
                        1 3 5
                        6 8 10
                        7 9 11
    """
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    tiles_n = tl.cdiv(n_size, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    within = program % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _products(
    a_ptr,  # (m_size, k_size)
    b_ptr,  # (k_size, n_size)
    c_ptr,  # the same; None unless BOTH
    rows,  # (BLOCK_M,), all inside
    cols,  # (BLOCK_N,)
    stride_am,
    stride_bk,
    stride_bn,
    stride_ck,
    stride_cn,
    n_size,
    k_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BOTH: tl.constexpr,
):
    """The tiles a[rows] b[:, cols] and a[rows] c[:, cols] in float32; zeros beyond n_size."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_am + ks[None, :]
    b_ptrs = b_ptr + ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_c = acc
    if BOTH:
        c_ptrs = c_ptr + ks[:, None].to(tl.int64) * stride_ck
        c_ptrs += cols[None, :].to(tl.int64) * stride_cn
    for k in range(0, k_size, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(ks < k_size - k)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(
                b_ptrs, mask=(ks < k_size - k)[:, None] & (cols < n_size)[None, :], other=0.0
            )
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if BOTH:
            if EVEN_K and EVEN_N:
                c = tl.load(c_ptrs)
            else:
                c = tl.load(
                    c_ptrs, mask=(ks < k_size - k)[:, None] & (cols < n_size)[None, :], other=0.0
                )
            acc_c = tl.dot(a, c, acc_c, input_precision="ieee")
            c_ptrs += BLOCK_K * tl.cast(stride_ck, tl.int64)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * tl.cast(stride_bk, tl.int64)
    return acc, acc_c


# A tile's products are finished in strips of so many columns, one after the other: the activation's
# registers are those of a strip, beside the accumulators of a whole tile. With a gate there are
# twice as many values of an element at hand.
STRIP = tl.constexpr(64)
GATED_STRIP = tl.constexpr(32)


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


# --- forward ------------------------------------------------------------------------------------


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
        left, right = _halves(product, BLOCK_M, WIDTH)
        gate_left, gate_right = left, right
        if GATED:
            gate_left, gate_right = _halves(gate_product, BLOCK_M, WIDTH)
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
                activated, _ = _activation_and_derivative(gate_pre, ACTIVATION)
                activated *= pre
            else:
                activated, _ = _activation_and_derivative(pre, ACTIVATION)
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
    tile_m, tile_n = _tile_of_program(tokens, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again and are not stored.
    product, gate_product = _products(
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
    pre = _empty_pre(rows, w1, gate) if save_pre else rows.new_empty(0)
    _launch_forward(rows, w1, b1, gate, gate_bias, activated, pre if save_pre else None, activation)
    if layout == "linear":
        out = F.linear(activated, w2, b2)
    else:
        out = torch.mm(activated, w2) if b2 is None else torch.addmm(b2, activated, w2)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1]), pre


def _empty_pre(rows: torch.Tensor, w1: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    shape = rows.shape[0], w1.shape[1]
    return rows.new_empty(shape if gate is None else (2, *shape))


def _launch_forward(
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
    tile = _tile(rows, w1, gate)
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
        **_blocks(tile, hidden, in_features),
    )


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
        left, right = _halves(dactivated, BLOCK_M, WIDTH)
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
            activated, derivative = _activation_and_derivative(gate_pre, ACTIVATION)
            dgate_pre = dactivated * pre * derivative
            dpre = dactivated * activated
            activated *= pre
            rounded = dgate_pre.to(dgate_pre_ptr.dtype.element_ty)
            tl.store(dgate_pre_ptr + offsets, rounded, mask=inside)
        else:
            activated, derivative = _activation_and_derivative(pre, ACTIVATION)
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
    tile_m, tile_n = _tile_of_program(tokens, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    product, _ = _products(
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
        db2 = _column_sums(drows, x.dtype)
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
                dgate_bias = _column_sums(gate_sums, x.dtype)
        if need_dx:
            dx = torch.mm(dpre, into.t())
            if gate_into is not None:
                dx.addmm_(dgate_pre, gate_into.t())
            dx = dx.view(x.shape)
        if need_dw1:
            dw1 = _weight_gradient(w1, layout, rows, dpre)
        if need_db1:
            db1 = _column_sums(sums, x.dtype)
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
    tile = _tile(drows, w2.t())
    if pre is None:
        pre = _empty_pre(rows, w1, gate)
        _launch_forward(rows, w1, b1, gate, gate_bias, None, pre, activation)
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
        **_blocks(tile, hidden, out_features),
    )
    return activated, dpre, sums


# --- column sums --------------------------------------------------------------------------------

SUM_ROWS = 256  # that one program adds up


@triton.jit(do_not_specialize=["rows"])
def _column_sums_kernel(
    matrix_ptr,  # (rows, columns)
    sums_ptr,  # (parts, columns), contiguous
    stride,
    rows,
    columns,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sums[p] = the sum of the rows p ROWS .. (p + 1) ROWS of the matrix, in float32."""
    part = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        row = part * ROWS + start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (cols < columns)[None, :]
        block = tl.load(matrix_ptr + row[:, None] * stride + cols[None, :], mask=inside, other=0.0)
        acc += block.to(tl.float32)
    sums = tl.sum(acc, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + part * columns + cols, sums, mask=cols < columns)


def _column_sums(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums of the columns of `matrix`, in an order that depends on its shape alone."""
    while True:
        rows, columns = matrix.shape
        parts = max(1, triton.cdiv(rows, SUM_ROWS))
        last = parts == 1
        sums = torch.empty(
            (parts, columns), dtype=dtype if last else torch.float32, device=matrix.device
        )
        launch.launch(
            _column_sums_kernel,
            (parts, triton.cdiv(columns, 64)),
            matrix,
            sums,
            matrix.stride(0),
            rows,
            columns,
            ROWS=SUM_ROWS,
            BLOCK_M=32,
            BLOCK_N=64,
            num_warps=4,
            num_stages=2,
        )
        if last:
            return sums.view(columns)
        matrix = sums


# --- what the launchers share -------------------------------------------------------------------


def _tile(rows: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None = None) -> tiles.Tile:
    """The tile of rows weight, (tokens, k) by (k, n), and of rows gate with it."""
    (tokens, k_size), n_size = rows.shape, weight.shape[1]
    long = 0
    for stride_k, stride_n in (w.stride() for w in (weight, gate) if w is not None):
        long |= stride_k if stride_n == 1 else stride_n if stride_k == 1 else 1
    return tiles.tile(
        launch.architecture(rows.device),
        rows.element_size(),
        tokens,
        n_size,
        launch.multiprocessors(rows.device),
        aligned=(k_size | n_size | rows.stride(0) | long) % 16 == 0,
        gated=gate is not None,
    )


def _blocks(tile: tiles.Tile, n_size: int, k_size: int) -> dict[str, int | bool]:
    """What a tile is to a kernel, for a product of these sizes, which a model fixes."""
    return {
        "EVEN_N": n_size % tile.block_n == 0,
        "EVEN_K": k_size % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
