"""The kinds of tensors that the ops take: elements in memory, found by strides."""

from __future__ import annotations

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

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


def check_floating(
    name: str, tensor: torch.Tensor, nested: str, of: tuple[str, torch.Tensor] | None = None
) -> None:
    """`check_dense`, and that the tensor has one of DTYPES and the device of the argument `of`."""
    check_dense(name, tensor, nested)
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(map(dtype_name, DTYPES))
        raise TypeError(
            f"{name} must have one of the dtypes {accepted}; got {dtype_name(tensor.dtype)}: "
            "cast it to one of them"
        )
    if of is not None and tensor.device != of[1].device:
        raise ValueError(
            f"{name} must be on the device of {of[0]}, {of[1].device}; got {tensor.device}: "
            "move it there"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
