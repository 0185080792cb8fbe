"""The definition of ffn: plain differentiable PyTorch, read as the formula.

    out = activation(x w1 + b1) w2 + b2
    out = (activation(x gate + gate_bias) * (x w1 + b1)) w2 + b2        with a gate

Computed in float64 for float64 inputs, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import contextlib

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.activations import DEFINITIONS
from fastattn.ops.ffn.problem import FFNProblem


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

        x, activation = rounded(x), DEFINITIONS[problem.activation]
        pre = linear(x, w1, b1)
        if gate is None:
            hidden = activation(pre)
        else:
            hidden = activation(linear(x, gate, gate_bias)) * pre
        return linear(hidden, w2, b2).to(problem.dtype)
