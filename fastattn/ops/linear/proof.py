"""How the kernels of linear prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn import proving
from fastattn.ops.common.activations import DEFINITIONS
from fastattn.ops.linear import registration
from fastattn.ops.linear.problem import LinearProblem, describe

# Longer than the tiles of 128, and no multiples of one; rows are aligned to 16 bytes.
TOKENS, IN_FEATURES, OUT_FEATURES = 141, 136, 264
FEW_TOKENS = 21  # such calls have tiles of their own
WIDER = 8  # makes all sizes multiples of 16, whose tiles are copied asynchronously


def family(problem: LinearProblem) -> str | None:
    """All features that select a kernel; under autocast it gets tensors that are cast already."""
    if problem.activation is None:
        return None  # ATen's product
    facts = [
        str(problem.dtype).removeprefix("torch."),
        problem.activation,
        "bias" if problem.has_bias else "",
        "aligned" if _aligned(problem) else "",
        "with gradients" if problem.needs_grad else "",
    ]
    return ", ".join(filter(None, facts))


def _aligned(problem: LinearProblem) -> bool:
    return problem.x_shape[-1] % 16 == problem.out_features % 16 == 0


def inputs(problem: LinearProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind, scaled so that all results are near 1."""
    more = WIDER if _aligned(problem) else 0
    in_features, out_features = IN_FEATURES + more, OUT_FEATURES + more
    given = {
        "x": draw(TOKENS, in_features),
        "weight": draw(out_features, in_features) / in_features**0.5,
        "bias": draw(out_features) if problem.has_bias else None,
    }
    return {
        name: x if x is None else x.requires_grad_(problem.needs_grad) for name, x in given.items()
    }


def kernel(problem: LinearProblem, given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""

    def run(x: torch.Tensor) -> torch.Tensor:
        tensors = given | {"x": x}
        small = describe(**tensors, activation=problem.activation)
        return registration.run_kernel(backend, True, small, **tensors)

    return {"out": run(given["x"]), "out of few tokens": run(given["x"][:FEW_TOKENS])}


def formula(problem: LinearProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors."""
    assert problem.activation is not None
    out = DEFINITIONS[problem.activation](F.linear(given["x"], given["weight"], given["bias"]))
    return {"out": out, "out of few tokens": out[:FEW_TOKENS]}


PROOF = proving.Proof(family, inputs, kernel, formula)
