"""What a TMA descriptor can be made of: addresses and strides, which a problem does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ALIGNMENT = 16  # bytes, of a descriptor's address and strides
MAX_STRIDE = 2**40  # bytes
MAX_SIZE = 2**31 - 1  # coordinates are 32-bit


def reads(x: torch.Tensor) -> bool:
    """Whether a descriptor can be made of `x`: 16-byte aligned, its last dimension contiguous.

    A dimension of size 1 may have any stride: its descriptor gets another one.
    """
    return x.numel() > 0 and x.data_ptr() % ALIGNMENT == 0 and fits(x)


def fits(x: torch.Tensor) -> bool:
    """Whether one can be made of its sizes and strides, at an aligned address."""
    *sizes, width = x.shape
    *strides, step = x.stride()
    if step != 1 != width:
        return False
    size = x.element_size()
    for n, stride in zip(sizes, strides):  # `all` takes longer
        stride *= size
        if n > MAX_SIZE or (n != 1 and (stride % ALIGNMENT or stride >= MAX_STRIDE)):
            return False
    return True


def misfit(**tensors: torch.Tensor) -> str | None:
    """The reason why no descriptor can be made of one of `tensors`, or None.

    Of a tensor without a place in memory, such as a fake one, only sizes and strides are asked.
    """
    for name, x in tensors.items():
        if not fits(x):
            return (
                f"TMA reads rows of contiguous elements, a multiple of {ALIGNMENT} bytes apart; "
                f"{name} has the shape {tuple(x.shape)} and the strides {x.stride()}: give "
                f"{name}.contiguous()"
            )
        if offset := _address(x) % ALIGNMENT:
            return (
                f"TMA reads from multiples of {ALIGNMENT} bytes; {name} begins {offset} bytes "
                f"after one: give {name}.clone()"
            )
    return None


def copies(rows: str, *matrices: str) -> Callable[[str, dict[str, Any]], str | None]:
    """For `explain`: what the Gluon kernels of a product copy before they run.

    Args:
        rows: the argument (..., features) whose features must lie side by side.
        matrices: those that are read in either order.
    """

    def remark(backend: str, arguments: dict[str, Any]) -> str | None:
        if backend != "gluon":
            return None
        copied = [
            name
            for name in (rows, *matrices)
            if (x := arguments.get(name)) is not None
            and x.element_size() == 2  # else autocast makes another one
            and not (_reads_rows(x) if name == rows else reads(x) or reads(x.t()))
        ]
        if not copied:
            return None
        return (
            f"after a copy of {' and '.join(copied)}: TMA reads contiguous elements at multiples "
            f"of {ALIGNMENT} bytes"
        )

    return remark


def _reads_rows(x: torch.Tensor) -> bool:
    try:
        return reads(x.view(-1, x.shape[-1]))
    except RuntimeError:  # no such view
        return False


def _address(x: torch.Tensor) -> int:
    """Where `x` lies, 0 if nowhere."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return 0
    try:
        return x.data_ptr()
    except RuntimeError:  # inside of a transform
        return 0
