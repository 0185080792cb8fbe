"""The one kind of tensor that the ops take: elements in memory, found by strides."""

from __future__ import annotations

import torch

# For ops that treat each row on its own.
BY_ROWS = (
    "call it on the rows, x.values(), and nest the result with "
    "torch.nested.nested_tensor_from_jagged(out, x.offsets()), or pad x with "
    "torch.nested.to_padded_tensor"
)


def check_dense(name: str, tensor: object, nested: str, none: str = "") -> torch.Tensor:
    """`tensor`; raises TypeError unless it is a dense torch.Tensor.

    Args:
        nested: what to do with a nested tensor.
        none: " or None" where the argument may be None.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor{none}; got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor, which this op does not take: {nested}")
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor; got the layout {tensor.layout}: "
            f"convert it with {name}.to_dense()"
        )
    return tensor
