"""The results of the operator `rotary` and of its backward: their shapes, dtypes and memory.

One place for the kernels and for the operators' fake implementations.
"""

from __future__ import annotations

import torch


def like(x: torch.Tensor) -> torch.Tensor:
    """Memory for the heads of x rotated: it lies as x does, but with contiguous heads."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def of_weight(dx: torch.Tensor, weight: torch.Tensor | None, wanted: bool) -> torch.Tensor:
    """Memory for a weight's gradient; empty where there is no weight, or nobody asked for it."""
    return dx.new_empty(0) if weight is None or not wanted else weight.new_empty(weight.shape)
