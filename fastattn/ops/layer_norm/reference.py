"""The definition of the norms: plain differentiable PyTorch, read as the formula.

    s = x + residual, rounded to its dtype
    layer_norm:  out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias   (biased variance)
    rms_norm:    out = s / sqrt(mean(s^2) + eps) * weight

Computed in float64 where an input is float64, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import torch

from fastattn.ops.layer_norm.problem import NormProblem


def unsupported(problem: NormProblem) -> str | None:
    return None


def forward(
    problem: NormProblem,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = torch.float64 if torch.float64 in problem.dtypes else torch.float32
    stream = x if residual is None else x + residual
    s = stream.to(precision)
    if problem.center:
        s = s - s.mean(-1, keepdim=True)
    out = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + problem.eps)
    if weight is not None:
        out = out * weight.to(precision)
    if bias is not None:
        out = out + bias.to(precision)
    return out.to(problem.out_dtype), stream
