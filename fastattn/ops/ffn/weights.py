"""The two layouts of a weight, seen as one."""

from __future__ import annotations

import torch


def columns(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """`weight` as the (in, out) view of it, whatever the layout."""
    return weight.t() if layout == "linear" else weight


def gradient_like(weight: torch.Tensor) -> torch.Tensor:
    """Memory for the gradient of `weight`: dense, its dimensions in the order of the weight's.

    The gradient of a parameter that is the transposed view of a buffer is one too, so an optimiser
    walks through both in one direction.
    """
    if weight.stride(0) < weight.stride(1):
        return weight.new_empty(weight.shape[::-1]).t()
    return weight.new_empty(weight.shape)
