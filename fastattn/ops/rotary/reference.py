"""The definition of `rotary`: plain differentiable PyTorch, read as the formula.

Computed in float64 where an input is float64, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import torch

from fastattn.ops.common.rotation import rotated
from fastattn.ops.rotary.problem import RotaryProblem


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
    cos, sin = (of_tokens(problem, x.to(problem.precision), positions) for x in (cos, sin))
    both = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x.to(problem.precision)
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + problem.eps)
            y = y * (weight.to(problem.precision) + problem.weight_offset)
        y = rotated(y, cos, sin, problem.rotary_dim, problem.interleaved)
        both.append(y.to(problem.dtype))
    return both[0], both[1]


def of_tokens(
    problem: RotaryProblem, angles: torch.Tensor, positions: torch.Tensor | None
) -> torch.Tensor:
    """cos or sin of every token, (batch or 1, seqlen, 1, width), which broadcasts to the heads."""
    if positions is not None:
        # Where nobody has looked at the positions (problem.py), they are cut to the table.
        angles = angles[positions.long().clamp(0, angles.shape[0] - 1)]
    elif problem.is_table:
        angles = angles[: problem.q_shape[1]]
    return angles.unsqueeze(-2) if angles.dim() == 3 else angles[None, :, None]
