"""The activations inside of Gluon kernels, as ops/common/triton/activations.py has them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.common.triton.activations import (
    CUBIC,
    FINITE,
    LINEAR,
    LOG2_E,
    ONE_OVER_SQRT_2_PI,
    SATURATED,
    SQRT_HALF,
    THREE_CUBIC,
)


@gluon.jit
def sigmoid(x):
    """s(x), and 1 - s(x) without the cancellation of a subtraction where s is near 1."""
    e = gl.exp2(x * -LOG2_E)
    s = 1.0 / (1.0 + e)
    return s, gl.minimum(e, FINITE) * s


@gluon.jit
def activation_and_derivative(x, ACTIVATION: gl.constexpr):
    """activation(x) and activation'(x) of a float32 tile; (x s(z))' = s + x s (1 - s) z'.

    A kernel that uses only the first does not compute the second.
    """
    if ACTIVATION == "gelu_tanh":
        c = gl.minimum(gl.maximum(x, -SATURATED), SATURATED)
        s, rest = sigmoid(c * (c * c * CUBIC + LINEAR))
        return x * s, s + x * s * rest * (c * c * THREE_CUBIC + LINEAR)
    elif ACTIVATION == "gelu":
        cdf = gl.erf(x * SQRT_HALF) * 0.5 + 0.5
        return x * cdf, cdf + x * gl.exp2(x * x * (-0.5 * LOG2_E)) * ONE_OVER_SQRT_2_PI
    elif ACTIVATION == "silu":
        s, rest = sigmoid(x)
        return x * s, s + x * s * rest
    else:
        gl.static_assert(ACTIVATION == "relu", "unknown activation")
        return gl.where(x <= 0.0, 0.0, x), gl.where(x <= 0.0, 0.0, 1.0)  # NaN stays NaN
