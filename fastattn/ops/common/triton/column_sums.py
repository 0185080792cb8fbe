"""Sums of a matrix's columns, as the gradient of a bias is one. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.common import launch

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


def column_sums(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums of the columns of `matrix`, in an order that depends only on its shape."""
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
