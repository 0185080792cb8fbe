"""The rotation of rotary position embedding in plain PyTorch (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pairs(x: torch.Tensor, interleaved: bool) -> Sequence[torch.Tensor]:
    """(first, second) elements of the pairs that turn together; views of x (..., rotary_dim)."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def joined(first: torch.Tensor, second: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The inverse of `pairs`, as a new tensor."""
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, interleaved: bool
) -> torch.Tensor:
    """x with its first `rotary_dim` columns turned.

        first' = first * cos - second * sin,    second' = second * cos + first * sin

    Args:
        x: (..., head_dim).
        cos, sin: broadcastable to x; the last dimension has an angle for each pair, or with
            `rotary_dim` columns one for each element.
    """
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = pairs(turned, interleaved)
    cos_first = cos_second = cos
    sin_first = sin_second = sin
    if cos.shape[-1] == rotary_dim:
        cos_first, cos_second = pairs(cos, interleaved)
        sin_first, sin_second = pairs(sin, interleaved)
    turned = joined(
        first * cos_first - second * sin_first,
        second * cos_second + first * sin_second,
        interleaved,
    )
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
