"""The gradients of a step, clipped; also where they lie in parts on several devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` and return the norm that they had.

    As `torch.nn.utils.clip_grad_norm_`, also for parts of tensors on different meshes.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    squares = torch.stack([_square(gradients_alike) for gradients_alike in _alike(gradients)])
    norm = squares.sum().sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that lies on several, else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _alike(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in groups of those that lie on the same mesh in the same way."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        where = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups.setdefault(where, []).append(tensor)
    return groups.values()


def _square(tensors: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, in float32; with one exchange."""
    square = torch.stack([local(tensor).float().square().sum() for tensor in tensors]).sum()
    first = tensors[0]
    if not isinstance(first, DTensor):
        return square
    parts = [Replicate() if place.is_replicate() else Partial() for place in first.placements]
    return DTensor.from_local(square, first.device_mesh, parts, run_check=False).full_tensor()
