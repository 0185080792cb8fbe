"""How the kernels of rotary prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn import proving
from fastattn.ops.common.rotation import rotated
from fastattn.ops.rotary import reference, registration
from fastattn.ops.rotary.problem import RotaryProblem, describe

BATCH, SEQLEN, HEADS, KV_HEADS = 2, 37, 5, 3
POSITIONS = 50  # rows of a table


def family(problem: RotaryProblem) -> str | None:
    """All features that select a kernel; lengths and the numbers of heads are not among them."""
    if 0 in problem.q_shape or 0 in problem.k_shape:
        return None

    def told(name: str, dtype: torch.dtype | None) -> str:
        return "" if dtype is None else f"{name} {str(dtype).removeprefix('torch.')}"

    facts = [
        told("x", problem.dtype),
        told("cos", problem.cos_dtype),
        told("sin", problem.sin_dtype) if problem.sin_dtype != problem.cos_dtype else "",
        told("q_weight", problem.q_weight_dtype),
        told("k_weight", problem.k_weight_dtype),
        "weight_offset" if problem.weight_offset else "",
        f"head_dim {int(problem.head_dim)}, {int(problem.rotary_dim)} rotated",
        "an angle for each element" if problem.width == problem.rotary_dim else "",
        "interleaved" if problem.interleaved else "",
        "positions" if problem.has_positions else "table" if problem.is_table else "",
        "with gradients" if problem.needs_grad else "",
    ]
    return ", ".join(filter(None, facts))


def inputs(problem: RotaryProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind."""
    head_dim = problem.head_dim
    leading = (POSITIONS,) if problem.is_table else (BATCH, SEQLEN)
    angles = draw(*leading, problem.width).float()
    # Numbers of the coarsest dtype, so that they are the same where all are cast to q's.
    coarsest = min(problem.dtypes, key=lambda dtype: dtype.itemsize)
    given: dict[str, Any] = {
        "q": draw(BATCH, SEQLEN, HEADS, head_dim),
        "k": draw(BATCH, SEQLEN, KV_HEADS, head_dim),
        "cos": angles.cos().to(coarsest).to(problem.cos_dtype),
        "sin": angles.sin().to(coarsest).to(problem.sin_dtype),
    }
    if problem.has_positions:
        tokens = torch.arange(BATCH * SEQLEN, device=problem.device)
        given["positions"] = (7 * tokens % POSITIONS).view(BATCH, SEQLEN)
    for name, dtype in (("q", problem.q_weight_dtype), ("k", problem.k_weight_dtype)):
        if dtype is not None:
            given[f"{name}_weight"] = draw(head_dim, dtype=coarsest).to(dtype)
    if problem.needs_grad:
        for name in {"q", "k", "q_weight", "k_weight"} & given.keys():
            given[name].requires_grad_()
    return given


def kernel(problem: RotaryProblem, given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""
    names = "q", "k", "cos", "sin", "positions", "q_weight", "k_weight"
    tensors: list[Any] = [given.get(name) for name in names]
    small = _described(problem, given)
    return dict(zip("qk", registration.run_kernel(backend, True, small, *tensors)))


def formula(problem: RotaryProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors."""
    small, found = _described(problem, given), {}
    cos, sin = (
        reference.of_tokens(small, given[x], given.get("positions")) for x in ("cos", "sin")
    )
    for name in "qk":
        x, weight = given[name], given.get(f"{name}_weight")
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + small.eps)
            x = x * (weight + small.weight_offset)
        found[name] = rotated(x, cos, sin, small.rotary_dim, small.interleaved)
    return found


def _described(problem: RotaryProblem, given: dict[str, Any]) -> RotaryProblem:
    return describe(
        **given, rotary_dim=problem.rotary_dim, interleaved=problem.interleaved, eps=problem.eps,
        weight_offset=problem.weight_offset,
    )  # fmt: skip


PROOF = proving.Proof(family, inputs, kernel, formula)
