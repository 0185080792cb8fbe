"""The definition of linear: plain differentiable PyTorch, read as the formula.

    out = activation(x weight^T + bias)

Computed in float64 for float64 inputs, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import contextlib

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.activations import DEFINITIONS
from fastattn.ops.linear.problem import LinearProblem


def forward(
    problem: LinearProblem, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    precision = modes.at_least_float32(problem.dtype)
    kind = problem.device.type
    autocast = modes.autocast_enabled(kind)
    # Autocast rounds the inputs to its dtype, but has no say in the precision of the definition.
    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():

        def rounded(t: torch.Tensor) -> torch.Tensor:
            return t.to(problem.dtype).to(precision)

        out = rounded(x) @ rounded(weight).t()
        if bias is not None:
            out = out + rounded(bias)
        if problem.activation is not None:
            out = DEFINITIONS[problem.activation](out)
        return out.to(problem.dtype)
