"""tanh for Triton kernels, which have none that every version compiles alike: the softcap's."""

from __future__ import annotations

import triton
import triton.language as tl

_TWO_LOG2_E = tl.constexpr(2.8853900817779268)
# tanh(x) for |x| < 0.625 as x + x^3 P(x^2), P fitted to a relative error of 5e-9.
_TANH_0 = tl.constexpr(-0.33333278)
_TANH_1 = tl.constexpr(0.13331331)
_TANH_2 = tl.constexpr(-0.05373001)
_TANH_3 = tl.constexpr(0.02060618)
_TANH_4 = tl.constexpr(-0.00566697)


@triton.jit
def tanh(x):
    """To float32's precision also near zero, where 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    p = square * _TANH_4 + _TANH_3
    p = p * square + _TANH_2
    p = p * square + _TANH_1
    p = p * square + _TANH_0
    near = x + x * square * p
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * _TWO_LOG2_E) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
