"""The definition of ffn: plain differentiable PyTorch, read as the formula.

    out = activation(x w1 + b1) w2 + b2

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
) -> torch.Tensor:
    if not problem.conv1d:
        w1, w2 = w1.t(), w2.t()  # (in_features, hidden), (hidden, out_features)
    precision = torch.float64 if problem.dtype == torch.float64 else torch.float32
    kind = problem.device.type
    autocast = modes.autocast_enabled(kind)
    # Autocast rounds the inputs to its dtype, but has no say in the precision of the definition.
    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
        x, w1, w2 = (t.to(problem.dtype).to(precision) for t in (x, w1, w2))
        pre = x @ w1
        if b1 is not None:
            pre = pre + b1.to(problem.dtype).to(precision)
        out = ACTIVATIONS[problem.activation](pre) @ w2
        if b2 is not None:
            out = out + b2.to(problem.dtype).to(precision)
        return out.to(problem.dtype)


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
