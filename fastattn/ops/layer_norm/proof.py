"""How the kernels of the norms prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn.ops.layer_norm.problem import NormProblem

ROWS, SMALLEST, LARGEST = 37, 40, 8200


def family(problem: NormProblem) -> str | None:
    """All features that select a kernel; gradients always count, a plan does not know of them."""
    if problem.dropout_p or problem.out_dtype != problem.stream_dtype or 0 in problem.shape:
        return None

    def told(name: str, dtype: torch.dtype | None) -> str:
        return "" if dtype is None else f"{name} {str(dtype).removeprefix('torch.')}"

    facts = [
        told("x", problem.dtype),
        told("weight", problem.weight_dtype),
        told("bias", problem.bias_dtype),
        told("residual", problem.residual_dtype),
        f"hidden {hidden_of(problem)}",
    ]
    return ", ".join(filter(None, facts))


def hidden_of(problem: NormProblem) -> int:
    """The hidden size of the small problem: kernels are chosen by powers of two."""
    hidden = min(max(int(problem.hidden), SMALLEST), LARGEST)
    largest_power = 1 << (hidden - 1).bit_length()
    return largest_power - largest_power // 8


def inputs(problem: NormProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind."""
    hidden = hidden_of(problem)
    shapes = {
        "x": ((ROWS, hidden), problem.dtype),
        "weight": ((hidden,), problem.weight_dtype),
        "bias": ((hidden,), problem.bias_dtype),
        "residual": ((ROWS, hidden), problem.residual_dtype),
    }
    return {
        name: None if dtype is None else draw(*shape, dtype=dtype).requires_grad_()
        for name, (shape, dtype) in shapes.items()
    }


def formula(problem: NormProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors."""
    x, weight, bias, residual = (given[name] for name in ("x", "weight", "bias", "residual"))
    stream = x if residual is None else x + residual
    if problem.center:
        out = F.layer_norm(stream, stream.shape[-1:], weight, bias, problem.eps)
    else:
        out = F.rms_norm(stream, stream.shape[-1:], weight, problem.eps)
    return {"out": out} if residual is None else {"out": out, "stream": stream}
