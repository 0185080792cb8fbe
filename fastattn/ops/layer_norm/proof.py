"""How the kernels of the norms prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn import proving
from fastattn.ops.layer_norm import reference, registration
from fastattn.ops.layer_norm.problem import NormProblem, describe

ROWS, SMALLEST, LARGEST = 37, 40, 8200
DROPOUT, SEED = 0.25, 2**40 + 7  # a seed of two words


def family(problem: NormProblem) -> str | None:
    """All features that select a kernel; gradients always count, a plan does not know of them."""
    if 0 in problem.shape:
        return None

    def told(name: str, dtype: torch.dtype | None) -> str:
        return "" if dtype is None else f"{name} {str(dtype).removeprefix('torch.')}"

    facts = [
        told("x", problem.dtype),
        told("weight", problem.weight_dtype),
        told("bias", problem.bias_dtype),
        told("residual", problem.residual_dtype),
        told("out", problem.out_dtype) if problem.out_dtype != problem.stream_dtype else "",
        "dropout" if problem.dropout_p else "",
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
    coarsest = min(problem.dtypes, key=lambda dtype: dtype.itemsize)
    # Numbers of the coarsest dtype, so that they are the same where all are cast to x's.
    given: dict[str, Any] = {
        name: None if dtype is None else draw(*shape, dtype=coarsest).to(dtype).requires_grad_()
        for name, (shape, dtype) in shapes.items()
    }
    if problem.dropout_p:
        given["seed"] = torch.tensor([SEED], device=problem.device)
    return given


def kernel(problem: NormProblem, given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""
    x, weight, bias, residual = (given[name] for name in ("x", "weight", "bias", "residual"))
    dropout_p = DROPOUT if problem.dropout_p else 0.0
    small = describe(x, weight, bias, problem.eps, residual, dropout_p, center=problem.center)
    small = dataclasses.replace(small, out_dtype=problem.out_dtype)  # autocast's
    tensors = x, weight, bias, residual, given.get("seed")
    return _named(problem, *registration.run_kernel(backend, True, small, *tensors))


def formula(problem: NormProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors; out in autocast's, if that is wider."""
    x, weight, bias, residual = (given[name] for name in ("x", "weight", "bias", "residual"))
    if problem.dropout_p:
        x = reference.dropped(x, given["seed"], DROPOUT)
    stream = x if residual is None else x + residual
    # The dtype of the tensors, but for 16-bit ones under autocast.
    wide = torch.promote_types(stream.dtype, problem.out_dtype)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    s = stream.to(wide)
    if problem.center:
        out = F.layer_norm(s, s.shape[-1:], weight, bias, problem.eps)
    else:
        out = F.rms_norm(s, s.shape[-1:], weight, problem.eps)
    return _named(problem, out, stream)


def _named(
    problem: NormProblem, out: torch.Tensor, stream: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {"out": out} if problem.residual_dtype is None else {"out": out, "stream": stream}


PROOF = proving.Proof(family, inputs, kernel, formula)
