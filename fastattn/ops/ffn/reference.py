"""The definition of ffn: plain differentiable PyTorch, read as the formula.

    out = activation(x w1 + b1) w2 + b2
    out = (activation(x gate + gate_bias) * (x w1 + b1)) w2 + b2        with a gate

Computed in float64 for float64 inputs, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch

from fastattn.ops.common import modes
from fastattn.ops.ffn.problem import FFNProblem


def unsupported(problem: FFNProblem) -> str | None:
    return None


def forward(
    problem: FFNProblem,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> torch.Tensor:
    precision = torch.float64 if problem.dtype == torch.float64 else torch.float32
    kind = problem.device.type
    autocast = modes.autocast_enabled(kind)
    # Autocast rounds the inputs to its dtype, but has no say in the precision of the definition.
    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():

        def rounded(t: torch.Tensor) -> torch.Tensor:
            return t.to(problem.dtype).to(precision)

        def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            product = x @ (rounded(w) if problem.conv1d else rounded(w).t())
            return product if b is None else product + rounded(b)

        x, activation = rounded(x), ACTIVATIONS[problem.activation]
        pre = linear(x, w1, b1)
        if gate is None:
            hidden = activation(pre)
        else:
            hidden = activation(linear(x, gate, gate_bias)) * pre
        return linear(hidden, w2, b2).to(problem.dtype)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """x P(X <= x) for a standard normal X (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The approximation of the same paper, which GPT-2 uses."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= 0.0, 0.0, x)  # NaN stays NaN


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
}
