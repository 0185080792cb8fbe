"""The `triton` backend of attention: FlashAttention-2's loops, features as constexpr switches."""

from __future__ import annotations

import torch

from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.triton.backward import backward
from fastattn.ops.attention.triton.forward import forward

__all__ = ["backward", "forward", "unsupported"]

MAX_HEAD_DIM = 256


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 is for torch and reference"
    if problem.device.type == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 dots wrong"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim {problem.head_dim} is above {MAX_HEAD_DIM}"
    if problem.dropout_p:
        return "the Triton kernels have no dropout"
    if problem.softmax_scale <= 0:
        return f"softmax_scale must be positive for the kernels, got {problem.softmax_scale}"
    return None
