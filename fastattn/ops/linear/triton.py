"""The `triton` backend of linear: the product with its activation, and the activation's derivative.

    forward     pre = x weight^T + bias, out = activation(pre)              kernel
    backward    dpre = dout activation'(pre), and its column sums           kernel
                over each tile's tokens
                dbias = the sums of those                                   kernel
                dweight = dpre^T x, dx = dpre weight                        ATen

The forward's kernel is ops/common/triton/activated.py. Any size and strides; float16, bfloat16 and
float32; sums in float32. No atomics. Another number of tokens compiles nothing new, but for the
three tiles of the product that it may choose from (ops/common/tiles.py) and a second round of the
bias's sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.common import launch
from fastattn.ops.common import triton as of_kernels
from fastattn.ops.common.matrices import as_rows, gradient_like
from fastattn.ops.common.triton.activated import launch_forward
from fastattn.ops.common.triton.activations import activation_and_derivative
from fastattn.ops.common.triton.column_sums import column_sums
from fastattn.ops.common.triton.products import MAX_COLUMNS
from fastattn.ops.linear import tiles
from fastattn.ops.linear.problem import LinearProblem


def unsupported(problem: LinearProblem) -> str | None:
    if problem.activation is None:
        return "without an activation there is nothing to fuse: ATen's product adds the bias"
    if problem.out_features > MAX_COLUMNS:
        return f"out_features {problem.out_features} is above {MAX_COLUMNS}"
    return of_kernels.unsupported(problem)


# --- forward ------------------------------------------------------------------------------------


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (..., out_features), and pre (tokens, out_features) if `save_pre`, else no elements."""
    rows = as_rows(x)
    shape = rows.shape[0], weight.shape[0]
    out, pre = rows.new_empty(shape), rows.new_empty(shape if save_pre else 0)
    launch_forward(rows, weight.t(), bias, None, None, out, pre if save_pre else None, activation)
    return out.view(*x.shape[:-1], weight.shape[0]), pre


# --- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _derivative_kernel(
    dout_ptr,  # (tokens, features)
    pre_ptr,  # (tokens, features), contiguous
    dpre_ptr,  # the same
    sums_ptr,  # (tiles of tokens, features), float32, contiguous
    stride_dout,
    tokens,
    features,
    ACTIVATION: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dpre = dout activation'(pre), sums = dpre over the tile's tokens."""
    tiles_n = tl.cdiv(features, BLOCK_N)
    tile_m = (tl.program_id(0) // tiles_n).to(tl.int64)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < tokens)[:, None] & (cols < features)[None, :]
    dout_ptrs = dout_ptr + rows[:, None] * stride_dout + cols[None, :]
    offsets = rows[:, None] * features + cols[None, :]
    dout = tl.load(dout_ptrs, mask=inside, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    _, derivative = activation_and_derivative(pre, ACTIVATION)
    dpre = dout * derivative
    tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
    if STORE_SUMS:
        tl.store(sums_ptr + tile_m * features + cols, tl.sum(dpre, 0), mask=cols < features)


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias; those that `needs` leaves out have no elements.

    `pre` is None if the forward did not save it.
    """
    need_dx, need_dweight, need_dbias = needs
    rows, drows = as_rows(x), as_rows(dout)
    if pre is None:
        pre = rows.new_empty(rows.shape[0], weight.shape[0])
        launch_forward(rows, weight.t(), bias, None, None, None, pre, activation)
    dpre, sums = _launch_derivative(drows, pre, need_dbias, activation)
    dx, dweight, dbias = (x.new_empty(0) for _ in needs)
    if need_dx:
        dx = torch.mm(dpre, weight).view(x.shape)
    if need_dweight:
        dweight = torch.mm(dpre.t(), rows, out=gradient_like(weight))
    if need_dbias:
        dbias = column_sums(sums, x.dtype)
    return dx, dweight, dbias


def _launch_derivative(
    drows: torch.Tensor, pre: torch.Tensor, need_sums: bool, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dpre, sums); the sums mean nothing unless they are needed."""
    (tokens, features), tile = pre.shape, tiles.DERIVATIVE
    tiles_m = triton.cdiv(tokens, tile.block_m)
    dpre = torch.empty_like(pre)
    sums = pre.new_empty(tiles_m, features, dtype=torch.float32) if need_sums else pre
    launch.launch(
        _derivative_kernel,
        (tiles_m * triton.cdiv(features, tile.block_n),),
        drows,
        pre,
        dpre,
        sums,
        drows.stride(0),
        tokens,
        features,
        ACTIVATION=activation,
        STORE_SUMS=need_sums,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=1,
    )
    return dpre, sums
