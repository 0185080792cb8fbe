"""The definition of linear_cross_entropy: the head, then the definition of cross_entropy.

    logits = x weight^T + bias,   loss = cross_entropy(logits, targets)

The logits have the dtype of the products, as a model's head makes them; the rest is float32, for
float64 float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastattn.ops.cross_entropy import reference as of_logits
from fastattn.ops.cross_entropy.problem import check_classes
from fastattn.ops.linear_cross_entropy.problem import LinearLossProblem


def forward(
    problem: LinearLossProblem,
    x: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (...)
    bias: torch.Tensor | None,  # (V,)
    class_weight: torch.Tensor | None,  # (V,)
) -> torch.Tensor:
    options = problem.options
    check_classes(targets, options.ignore_index, problem.classes)
    logits = F.linear(x, weight, bias)
    losses = of_logits.token_losses(logits, targets, class_weight, options)
    return of_logits.reduce(losses, targets, class_weight, options)
