"""Parts of Triton kernels that several ops have."""

from __future__ import annotations

from typing import Any

import torch

from fastattn import backends


def unsupported(problem: Any, *, products: bool = True) -> str | None:
    """The reason why no kernel runs a problem under such a transform, or of such a dtype, or None.

    Args:
        products: whether the kernels have products.
    """
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 is for torch and reference"
    if products and problem.dtype == torch.bfloat16 and backends.triton_runs() == "interpreted":
        return "Triton's interpreter computes bfloat16 dots wrong"
    return None
