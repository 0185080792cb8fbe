"""The `torch` backend of the norms: ATen's dropout, layer_norm and rms_norm.

ATen takes parameters of another dtype than x's in few combinations, which differ by device; the
others are computed in the promoted dtype.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastattn.ops.layer_norm.problem import NormProblem

HALVES = (torch.float16, torch.bfloat16)


def forward(
    problem: NormProblem,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, stream)."""
    if problem.dropout_p:
        x = F.dropout(x, problem.dropout_p)
    stream = x if residual is None else x + residual
    precision, s = _promoted(problem), stream
    if precision is not None:
        s = stream.to(precision)
        weight = None if weight is None else weight.to(precision)
        bias = None if bias is None else bias.to(precision)
    if problem.center:
        out = torch.layer_norm(s, (problem.hidden,), weight, bias, problem.eps)
    else:
        out = torch.rms_norm(s, (problem.hidden,), weight, problem.eps)
    return out if precision is None else out.to(problem.out_dtype), stream


def _promoted(problem: NormProblem) -> torch.dtype | None:
    """The dtype to compute in if ATen does not take the dtypes as they are, else None."""
    stream, weight, bias = problem.stream_dtype, problem.weight_dtype, problem.bias_dtype
    if weight in (None, stream) and bias in (None, stream):
        return None
    # ATen's CPU kernel reads float32 parameters beside a 16-bit x.
    on_cpu = problem.center and problem.device.type == "cpu" and stream in HALVES
    if on_cpu and weight == torch.float32 and bias in (None, torch.float32):
        return None
    parameters = (dtype for dtype in (weight, bias) if dtype is not None)
    return functools.reduce(torch.promote_types, parameters, stream)
