"""The definition of the norms: plain differentiable PyTorch, read as the formula.

    s = dropout(x) + residual, rounded to its dtype
    layer_norm:  out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias   (biased variance)
    rms_norm:    out = s / sqrt(mean(s^2) + eps) * weight

Computed in float64 where an input is float64, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import math

import torch

from fastattn.ops.common import dropout
from fastattn.ops.layer_norm.problem import NormProblem


def forward(
    problem: NormProblem,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = torch.float64 if torch.float64 in problem.dtypes else torch.float32
    if residual is None:
        stream = x
    elif problem.dropout_p:
        seed = dropout.draw_seed(x.device)
        kept = dropped(x.to(precision), seed, problem.dropout_p)
        stream = (kept + residual).to(problem.stream_dtype)
    else:
        stream = x + residual
    s = stream.to(precision)
    if problem.center:
        s = s - s.mean(-1, keepdim=True)
    out = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + problem.eps)
    if weight is not None:
        out = out * weight.to(precision)
    if bias is not None:
        out = out + bias.to(precision)
    return out.to(problem.out_dtype), stream


def dropped(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """(..., hidden), in x's dtype: the elements that dropout keeps, scaled, and 0."""
    rows, hidden = math.prod(x.shape[:-1]), x.shape[-1]
    kept = dropout.keep(seed, dropout_p, rows, hidden).view(x.shape)
    return torch.where(kept, x / (1.0 - dropout_p), 0.0)
