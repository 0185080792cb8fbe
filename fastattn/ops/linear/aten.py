"""The `torch` backend of linear: ATen's product, then its activation.

Plain differentiable PyTorch. Where no gradient goes through it the activation is in place, and
saves a tensor of the result's size; ReLU, whose derivative needs only its result, is in place with
gradients too. Nothing is in place in a recording (torch.compile, torch.jit.trace) or under a
torch.func transform.
"""

from __future__ import annotations

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.activations import activate
from fastattn.ops.linear.few_rows import product
from fastattn.ops.linear.problem import LinearProblem


def forward(
    problem: LinearProblem, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out = product(x, weight, bias)
    if problem.activation is None:
        return out
    return activate(problem.activation, problem.transformed or modes.recorded(), out)
