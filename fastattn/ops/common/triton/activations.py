"""The activations inside of kernels, with their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

# Constants stand on the right of a tensor: on the left they would swallow it in the interpreter.
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# gelu_tanh(x) = x sigmoid(LINEAR x + CUBIC x^3), for (1 + tanh u) / 2 = sigmoid(2 u):
LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.07135481627260025)  # 0.044715 LINEAR
THREE_CUBIC = tl.constexpr(0.21406444881780073)
# Beyond it that sigmoid is 0 or 1 in float32; its argument is kept finite.
SATURATED = tl.constexpr(16.0)
FINITE = tl.constexpr(3.0e38)  # in float32; times the sigmoid of where exp(-x) is infinite it is 0


@triton.jit
def _sigmoid(x):
    """s(x) and 1 - s(x), the latter without the cancellation of a subtraction where s is near 1."""
    e = tl.exp2(x * -LOG2_E)
    s = 1.0 / (1.0 + e)
    return s, tl.minimum(e, FINITE) * s


@triton.jit
def activation_and_derivative(x, ACTIVATION: tl.constexpr):
    """activation(x) and activation'(x) of a float32 block; (x s(z))' = s + x s (1 - s) z'.

    A kernel that uses only the first does not compute the second.
    """
    if ACTIVATION == "gelu_tanh":
        c = tl.minimum(tl.maximum(x, -SATURATED), SATURATED)
        s, rest = _sigmoid(c * (c * c * CUBIC + LINEAR))
        return x * s, s + x * s * rest * (c * c * THREE_CUBIC + LINEAR)
    elif ACTIVATION == "gelu":
        cdf = tl.erf(x * SQRT_HALF) * 0.5 + 0.5
        return x * cdf, cdf + x * tl.exp2(x * x * (-0.5 * LOG2_E)) * ONE_OVER_SQRT_2_PI
    elif ACTIVATION == "silu":
        s, rest = _sigmoid(x)
        return x * s, s + x * s * rest
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)  # NaN stays NaN
