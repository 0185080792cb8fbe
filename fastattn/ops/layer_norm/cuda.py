"""The norms' CUDA C++ kernels (csrc/layer_norm): `forward` and `backward`, as in triton.py.

The op's outputs and scratch are made here; which kernel runs is settled in csrc/layer_norm/*.cu, by
hidden size, dtypes and alignment. Rows that are evenly spaced are read in place.
"""

from __future__ import annotations

import torch

from fastattn.ops.common.matrices import as_rows
from fastattn.ops.layer_norm import results
from fastattn.ops.layer_norm.problem import NormProblem

MAX_HIDDEN = 2**30  # the kernels count columns with 32 bits
LONGEST_WITH_SUMS = 8192  # csrc/layer_norm/backward.cu: a row's sums over rows stay in registers


def unsupported(problem: NormProblem) -> str | None:
    if problem.transformed:
        return "the kernels have no forward-mode or batching rule"
    if torch.float64 in problem.dtypes:
        return "the kernels compute in float32: float64 would lose precision"
    if problem.dropout_p:
        return "the CUDA kernels of the norms have no dropout"
    if problem.hidden > MAX_HIDDEN:
        return f"the kernels take hidden sizes up to {MAX_HIDDEN}; got {problem.hidden}"
    return None


def forward(
    x: torch.Tensor,  # (..., hidden)
    residual: torch.Tensor | None,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    bias: torch.Tensor | None,  # (hidden,)
    eps: float,
    center: bool,
    out_dtype: torch.dtype,
    dropout_seed: None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, stream, statistics), as results.py has them."""
    assert dropout_seed is None, "unsupported() refuses it"
    out, stream, statistics = results.of_forward(x, residual, center, out_dtype)
    if out.numel() == 0:
        return out, stream, statistics
    hidden = x.shape[-1]
    torch.ops.fastattn_cuda.layer_norm_forward(
        out.view(-1, hidden), None if residual is None else stream.view(-1, hidden), statistics,
        as_rows(x), None if residual is None else as_rows(residual),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(), eps, center,
    )  # fmt: skip
    return out, stream, statistics


def backward(
    dout: torch.Tensor,  # (..., hidden)
    dstream: torch.Tensor | None,  # (..., hidden)
    stream: torch.Tensor,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    statistics: torch.Tensor,  # (2 or 1, ...), of forward
    center: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    weight_grad: bool,
    dropout_seed: None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dresidual, dweight, dbias), as results.py has them."""
    assert dropout_seed is None, "unsupported() refuses it"
    dx, dresidual, dweight, dbias = results.of_backward(
        stream, weight, x_dtype, residual_dtype, bias_dtype, weight_grad
    )
    hidden, device = stream.shape[-1], stream.device
    bias_grad, has_dresidual = bias_dtype is not None, dresidual.numel() > 0
    if stream.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    stream = as_rows(stream)
    partials = None
    if weight_grad or bias_grad:
        shape = (weight_grad + bias_grad, sum_blocks(stream.shape[0], hidden), hidden)
        partials = torch.empty(shape, dtype=torch.float32, device=device)
    torch.ops.fastattn_cuda.layer_norm_backward(
        dx.view(-1, hidden), dresidual.view(-1, hidden) if has_dresidual else None,
        dweight if weight_grad else None, dbias if bias_grad else None, partials, as_rows(dout),
        None if dstream is None else as_rows(dstream), stream,
        None if weight is None else weight.contiguous(), statistics, center,
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


def sum_blocks(rows: int, hidden: int) -> int:
    """How many blocks share the rows where gradients of weight and bias are summed.

    It settles the order of the sums, and so depends only on the shape: the same bits on every GPU.
    As many as the 108 multiprocessors of an A100 hold at a time, 2 or 3 each by their registers; an
    H100's 132 have enough loads under way with as many. More would cost time, for each block's sums
    are written and read once. Few rows have fewer blocks, so that each has a few steps to sum over.
    """
    if hidden > LONGEST_WITH_SUMS:  # a kernel of its own: blocks of up to 1024 columns
        return max(1, min(324 // -(-hidden // 1024), -(-rows // 16)))
    at_once = max(1, 2048 // hidden)  # rows of a block
    return min(324 if 512 < hidden <= 768 else 216, -(-rows // (4 * at_once)))
