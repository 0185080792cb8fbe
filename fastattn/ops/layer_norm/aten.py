"""The `torch` backend of the norms: ATen's layer_norm and rms_norm.

ATen takes parameters of another dtype than x's in few combinations, which differ by device; the
others are computed in the promoted dtype.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fastattn.ops.common.straight import ERRORS, plain
from fastattn.ops.layer_norm.problem import NormProblem

HALVES = (torch.float16, torch.bfloat16)


def unsupported(problem: NormProblem) -> str | None:
    return None


def straight(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: Any,
    residual: torch.Tensor | None,
    center: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """A plain call on a CPU (ops/common/straight.py); None for any other.

    Neither transforms nor autocast change what the backend does.
    """
    try:
        if not plain(x, weight, bias, residual):
            return None
        # ATen takes any number; None it takes as rms_norm does.
        valid = type(eps) is float and 0.0 <= eps < math.inf
        if not valid and (center or eps is not None):
            return None
        stream = x
        if residual is not None:
            if residual.shape != x.shape:
                return None
            stream = x + residual
        shape = (x.shape[-1],)
        if center:
            out = torch.layer_norm(stream, shape, weight, bias, eps)
        else:
            out = torch.rms_norm(stream, shape, weight, eps)
    except ERRORS:
        return None
    return out if residual is None else (out, stream)


def forward(
    problem: NormProblem,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, stream)."""
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
