"""Sums and parts of tensors over the processes of a group, with their gradients.

Between `entering` and `leaving` each process computes a part of a layer; outside all have the same
tensors, and the same gradients of them (Shoeybi et al. 2019, arXiv:1909.08053, section 3, where
they are called f and g).

                forward                     backward
    entering    nothing                     sum over the processes
    leaving     sum over the processes      nothing
    joined      the parts side by side      the process' own part
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def entering(x: Tensor, group: Group) -> Tensor:
    """`x`, of which each process computes a part: its gradient is the sum of all parts'."""
    out: Tensor = _Entering.apply(x, group)
    return out


def leaving(x: Tensor, group: Group) -> Tensor:
    """The sum of the processes' terms `x`, with which all go on alike."""
    out: Tensor = _Leaving.apply(x, group)
    return out


def joined(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """The processes' parts side by side: (..., sizes[rank]) -> (..., sum of sizes)."""
    out: Tensor = _Joined.apply(x, sizes, group)
    return out


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of the processes' `x`, without a gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.rank = sizes, dist.get_rank(group)
        # Parts of one size are what every engine can gather.
        part = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(part) for _ in sizes]
        dist.all_gather(parts, part, group=group)
        return torch.cat([each[..., :size] for each, size in zip(parts, sizes)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.split(ctx.sizes, -1)[ctx.rank], None, None
