"""How the kernels of ffn prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn import proving
from fastattn.ops.common.activations import DEFINITIONS
from fastattn.ops.ffn import registration
from fastattn.ops.ffn.problem import FFNProblem, describe

# Longer than the tiles of 128, or of 192 tokens, and no multiples of one; rows are aligned to 16
# bytes.
TOKENS, IN_FEATURES, HIDDEN, OUT_FEATURES = 205, 136, 264, 152
FEW_TOKENS = 21  # such calls have tiles of their own
WIDER = 8  # makes all sizes multiples of 16, whose tiles are copied asynchronously


def family(problem: FFNProblem) -> str:
    """All features that select a kernel; under autocast it gets tensors that are cast already."""
    facts = [
        str(problem.dtype).removeprefix("torch."),
        f"{problem.activation}, layout {problem.layout}",
        "b1" if problem.has_bias1 else "",
        "b2" if problem.has_bias2 else "",
        "gate" if problem.gated else "",
        "gate_bias" if problem.has_gate_bias else "",
        "recompute" if problem.recompute else "",
        "aligned" if _aligned(problem) else "",
        "with gradients" if problem.needs_grad else "",
    ]
    return ", ".join(filter(None, facts))


def _aligned(problem: FFNProblem) -> bool:
    sizes = problem.in_features, problem.hidden, problem.out_features
    return all(size % 16 == 0 for size in sizes)


def inputs(problem: FFNProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind, scaled so that all results are near 1."""

    def weight(inner: int, outer: int) -> torch.Tensor:
        return draw(*((inner, outer) if problem.conv1d else (outer, inner))) / inner**0.5

    more = WIDER if _aligned(problem) else 0
    in_features, hidden, out_features = (n + more for n in (IN_FEATURES, HIDDEN, OUT_FEATURES))
    given = {
        "x": draw(TOKENS, in_features),
        "w1": weight(in_features, hidden),
        "b1": draw(hidden) if problem.has_bias1 else None,
        "w2": weight(hidden, out_features),
        "b2": draw(out_features) if problem.has_bias2 else None,
        "gate": weight(in_features, hidden) if problem.gated else None,
        "gate_bias": draw(hidden) if problem.has_gate_bias else None,
    }
    return {
        name: x if x is None else x.requires_grad_(problem.needs_grad) for name, x in given.items()
    }


def kernel(problem: FFNProblem, given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""

    def run(x: torch.Tensor) -> torch.Tensor:
        tensors = given | {"x": x}
        small = describe(
            **tensors, activation=problem.activation, layout=problem.layout,
            recompute=problem.recompute,
        )  # fmt: skip
        return registration.run_kernel(backend, True, small, **tensors)

    return {"out": run(given["x"]), "out of few tokens": run(given["x"][:FEW_TOKENS])}


def formula(problem: FFNProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors."""

    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, w.t() if problem.conv1d else w, b)

    activation = DEFINITIONS[problem.activation]
    hidden = linear(given["x"], given["w1"], given["b1"])
    if given["gate"] is None:
        hidden = activation(hidden)
    else:
        hidden = activation(linear(given["x"], given["gate"], given["gate_bias"])) * hidden
    out = linear(hidden, given["w2"], given["b2"])
    return {"out": out, "out of few tokens": out[:FEW_TOKENS]}


PROOF = proving.Proof(family, inputs, kernel, formula)
