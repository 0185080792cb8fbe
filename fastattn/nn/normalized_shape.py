"""Several normalised dimensions as one, which is what the ops normalise."""

from __future__ import annotations

from typing import overload

from torch import Tensor


def check_shapes(
    name: str, x: Tensor, residual: Tensor | None, normalized_shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless x (the argument ``name``) ends so, and ``residual`` is like it."""
    if x.shape[-len(normalized_shape) :] != normalized_shape:
        raise ValueError(
            f"{name} must end in normalized_shape={normalized_shape}, got the shape "
            f"{tuple(x.shape)}: build the layer with the size of {name}'s last dimensions"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have {name}'s shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )


@overload
def fold(tensor: Tensor, normalized_shape: tuple[int, ...]) -> Tensor: ...
@overload
def fold(tensor: Tensor | None, normalized_shape: tuple[int, ...]) -> Tensor | None: ...
def fold(tensor: Tensor | None, normalized_shape: tuple[int, ...]) -> Tensor | None:
    """(..., *normalized_shape) -> (..., their product); a view if these dimensions are dense."""
    if tensor is None or len(normalized_shape) == 1:
        return tensor
    return tensor.flatten(-len(normalized_shape))


def unfold(
    result: Tensor | tuple[Tensor, Tensor], normalized_shape: tuple[int, ...]
) -> Tensor | tuple[Tensor, Tensor]:
    """Undo `fold` on what an op returned: a tensor, or the tensor and its residual; views."""
    if len(normalized_shape) == 1:
        return result
    if isinstance(result, tuple):
        out, residual = result
        shape = (*out.shape[:-1], *normalized_shape)
        return out.view(shape), residual.view(shape)
    return result.view(*result.shape[:-1], *normalized_shape)
