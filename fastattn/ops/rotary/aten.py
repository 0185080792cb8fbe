"""The `torch` backend of `rotary`: fewer and smaller temporaries than the formula written out.

    y = cos * x + sin' * swapped(x)

where `swapped` exchanges the elements of each pair, and sin' is sin with the sign of its element.
A small x takes few operators. For a large one memory decides: sin' * swapped(x) is added in place,
without a temporary of x's size; but not into every second element of 16 bits, which takes ATen 1.4
times as long as the formula written out (AMD EPYC, one thread, torch 2.13, 2026-11-29).
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.rotation import joined, pairs
from fastattn.ops.rotary.problem import RotaryProblem
from fastattn.ops.rotary.reference import of_tokens

LEAST_IN_PLACE = 2**17  # elements


def forward(
    problem: RotaryProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    interleaved, dtype = problem.interleaved, problem.promoted
    cos, sin = of_tokens(problem, cos, positions), of_tokens(problem, sin, positions)
    if problem.mixed:
        cos, sin = cos.to(dtype), sin.to(dtype)
    if problem.width == problem.rotary_dim:
        first, second = pairs(sin, interleaved)
        sin = joined(-first, second, interleaved)
    else:
        cos, sin = joined(cos, cos, interleaved), joined(-sin, sin, interleaved)
    return (
        _one(problem, q, cos, sin, q_weight, dtype),
        _one(problem, k, cos, sin, k_weight, dtype),
    )


def _one(
    problem: RotaryProblem,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """q or k, with cos and sin for each element."""
    interleaved = problem.interleaved
    if weight is not None:
        x = _normed(problem, x, weight, dtype)
    elif problem.mixed:
        x = x.to(dtype)
    if not problem.plain or x.numel() < LEAST_IN_PLACE or (interleaved and x.itemsize == 2):
        out = _rotated(x, cos, sin, interleaved)
    elif modes.needs_grad(x):
        out = _InPlace.apply(x, cos, sin, interleaved)
    else:
        out = _rotated_in_place(x, cos, sin, interleaved)
    return out if out.dtype == problem.dtype else out.to(problem.dtype)


def _normed(
    problem: RotaryProblem, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if problem.weight_offset or weight.dtype != dtype:
        # 1 + weight has no place in 16 bits.
        dtype = torch.promote_types(torch.promote_types(dtype, weight.dtype), torch.float32)
        weight = weight.to(dtype) + problem.weight_offset
    return torch.rms_norm(x.to(dtype), (problem.head_dim,), weight, problem.eps)


def _swapped(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if not interleaved:
        return torch.roll(x, x.shape[-1] // 2, -1)
    first, second = pairs(x, interleaved)
    return joined(second, first, interleaved)


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x (..., head_dim), the rest after the columns of cos and sin as it is."""
    turned, width = x, cos.shape[-1]
    if width < x.shape[-1]:
        turned = x[..., :width]
    turned = torch.addcmul(turned * cos, _swapped(turned, interleaved), sin)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def _rotated_in_place(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The same, as a new tensor to whose halves the rest is added; not for autograd."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        out = turned = x * cos
    else:
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
        turned, x_rest = out[..., :width], x[..., width:]
        out[..., width:] = x_rest
        x = x[..., :width]
        torch.mul(x, cos, out=turned)
    first, second = pairs(x, interleaved)
    sin_first, sin_second = pairs(sin, interleaved)
    out_first, out_second = pairs(turned, interleaved)
    out_first.addcmul_(second, sin_first)
    out_second.addcmul_(first, sin_second)
    return out


class _InPlace(torch.autograd.Function):
    """`_rotated_in_place` with a derivative: the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: bool) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = way
        return _rotated_in_place(x, cos, sin, way)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        # The transpose of cos * x + sin' * swapped(x).
        back = dout, cos, _swapped(sin, ctx.interleaved), ctx.interleaved
        if modes.transformed() or modes.recorded():  # of the cotangents, or of the backward
            dx = _rotated(*back)
        elif modes.needs_grad(dout):
            dx = _InPlace.apply(*back)
        else:
            dx = _rotated_in_place(*back)
        return dx, None, None, None
