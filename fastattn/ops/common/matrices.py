"""Tensors as kernels read them: tokens as rows, the two layouts of a weight seen as one."""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., features) as (tokens, features), contiguous in the features; a view where it can be."""
    if x.dim() != 2:
        x = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` itself where it is contiguous, else a copy."""
    return None if x is None else x.contiguous()


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
