"""How the kernels of ffn prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn.ops.common.activations import DEFINITIONS
from fastattn.ops.ffn.problem import FFNProblem

# Longer than the tiles of 128, and no multiples of one; rows are aligned to 16 bytes.
TOKENS, IN_FEATURES, HIDDEN, OUT_FEATURES = 141, 136, 264, 152


def family(problem: FFNProblem) -> str | None:
    """All features that select a kernel."""
    if problem.autocast:
        return None
    facts = [
        str(problem.dtype).removeprefix("torch."),
        f"{problem.activation}, layout {problem.layout}",
        "b1" if problem.has_bias1 else "",
        "b2" if problem.has_bias2 else "",
        "gate" if problem.gated else "",
        "gate_bias" if problem.has_gate_bias else "",
        "recompute" if problem.recompute else "",
        "with gradients" if problem.needs_grad else "",
    ]
    return ", ".join(filter(None, facts))


def inputs(problem: FFNProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind, scaled so that all results are near 1."""

    def weight(inner: int, outer: int) -> torch.Tensor:
        return draw(*((inner, outer) if problem.conv1d else (outer, inner))) / inner**0.5

    given = {
        "x": draw(TOKENS, IN_FEATURES),
        "w1": weight(IN_FEATURES, HIDDEN),
        "b1": draw(HIDDEN) if problem.has_bias1 else None,
        "w2": weight(HIDDEN, OUT_FEATURES),
        "b2": draw(OUT_FEATURES) if problem.has_bias2 else None,
        "gate": weight(IN_FEATURES, HIDDEN) if problem.gated else None,
        "gate_bias": draw(HIDDEN) if problem.has_gate_bias else None,
    }
    return {
        name: x if x is None else x.requires_grad_(problem.needs_grad) for name, x in given.items()
    }


def options(problem: FFNProblem) -> dict[str, Any]:
    """The other arguments of the call."""
    return {
        "activation": problem.activation,
        "layout": problem.layout,
        "recompute": problem.recompute,
    }


def formula(problem: FFNProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The result by name, in the dtype of the tensors."""

    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, w.t() if problem.conv1d else w, b)

    activation = DEFINITIONS[problem.activation]
    hidden = linear(given["x"], given["w1"], given["b1"])
    if given["gate"] is None:
        hidden = activation(hidden)
    else:
        hidden = activation(linear(given["x"], given["gate"], given["gate_bias"])) * hidden
    return {"out": linear(hidden, given["w2"], given["b2"])}
