"""The tensors of an op that multiplies matrices: what they must have in common."""

from __future__ import annotations

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.dense import BY_ROWS, DTYPES, check_dense, dtype_name


def check_factors(tensors: dict[str, torch.Tensor | None], optional: tuple[str, ...]) -> None:
    """Raise unless all are tensors of one dtype (or autocast makes it one) on one device.

    Args:
        tensors: by the arguments' names, x first.
        optional: the names of those that may be None.

    Raises:
        TypeError: no dense tensor, or a dtype that does not fit.
        ValueError: different devices.
    """
    *names, last = tensors
    together = f"{', '.join(names)} and {last}"
    x = check_dense("x", tensors["x"], BY_ROWS)
    one_dtype = modes.autocast_dtype(x.device.type) is None or x.dtype == torch.float64
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        tensor = check_dense(name, tensor, BY_ROWS, " or None" if name in optional else "")
        dtype = dtype_name(tensor.dtype)
        if tensor.dtype not in DTYPES:
            accepted = ", ".join(map(dtype_name, DTYPES))
            raise TypeError(f"{name} must have one of the dtypes {accepted}; got {dtype}")
        if tensor.dtype != x.dtype and (one_dtype or tensor.dtype == torch.float64):
            raise TypeError(
                f"{together} must have one dtype; got x {dtype_name(x.dtype)}, {name} {dtype}: "
                "cast them to the same"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{together} must be on one device; got x on {x.device}, {name} on {tensor.device}"
            )
