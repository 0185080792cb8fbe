"""How the kernels of linear_cross_entropy prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn import proving
from fastattn.ops.cross_entropy.proof import of_options, options_of, targets_of
from fastattn.ops.linear_cross_entropy import reference, registration
from fastattn.ops.linear_cross_entropy.problem import LinearLossProblem, describe

# Longer than the tiles of 128, or of 192 rows, and no multiples of one; rows are aligned to 16
# bytes.
ROWS, FEATURES, CLASSES = 205, 136, 264
FEW_ROWS = 21  # such calls have a kernel of their own
WIDER = 8  # makes all sizes multiples of 16, whose tiles are copied asynchronously


def family(problem: LinearLossProblem) -> str | None:
    """All features that select a kernel; under autocast it gets tensors that are cast already."""
    if 0 in problem.x_shape:
        return None
    grads = [name for name, need in zip(("x", "weight", "bias"), problem.needs) if need]
    facts = [
        str(problem.dtype).removeprefix("torch."),
        "bias" if problem.has_bias else "",
        "" if problem.class_weight_dtype is None else "class_weight",
        *of_options(problem.options),
        "" if problem.options.reduction == "none" else "summed",
        "aligned" if _aligned(problem) else "",
        f"with gradients of {', '.join(grads)}" if grads else "",
    ]
    return ", ".join(filter(None, facts))


def _aligned(problem: LinearLossProblem) -> bool:
    return problem.x_shape[-1] % 16 == problem.classes % 16 == 0


def inputs(problem: LinearLossProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind.

    The logits are so far apart that the other classes' part of a gradient is as large as the
    target's.
    """
    more = WIDER if _aligned(problem) else 0
    features, classes = FEATURES + more, CLASSES + more
    weighted = problem.class_weight_dtype is not None
    given = {
        "x": 2 * draw(ROWS, features),
        "weight": draw(classes, features) / features**0.5,
        "bias": draw(classes) if problem.has_bias else None,
        "class_weight": draw(classes).abs() if weighted else None,
        "targets": targets_of(ROWS, classes, problem.device),
    }
    for name, need in zip(("x", "weight", "bias"), problem.needs):
        if need:
            given[name].requires_grad_()
    return given


def kernel(
    problem: LinearLossProblem, given: dict[str, Any], backend: str
) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""

    def run(small: LinearLossProblem, *tensors: torch.Tensor) -> torch.Tensor:
        return registration.run_kernel(backend, True, small, *tensors)

    return _results(problem, given, run)


def formula(problem: LinearLossProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name: the logits in the dtype of the tensors, the rest in float32 at least."""
    return _results(problem, given, reference.forward)


def _results(
    problem: LinearLossProblem, given: dict[str, Any], run: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    few = given | {name: given[name][:FEW_ROWS] for name in ("x", "targets")}
    small, tensors = _call(problem, given)
    of_few = _call(problem, few)
    return {
        **_named(run(small, *tensors), given),
        **{f"{n} of few rows": x for n, x in _named(run(of_few[0], *of_few[1]), few).items()},
    }


def _call(
    problem: LinearLossProblem, given: dict[str, Any]
) -> tuple[LinearLossProblem, tuple[torch.Tensor, ...]]:
    names = "x", "weight", "targets", "bias", "class_weight"
    reduction = "none" if problem.options.reduction == "none" else "sum"
    options = options_of(problem.options, reduction)
    return describe(**given, **options._asdict()), tuple(given[name] for name in names)


def _named(loss: torch.Tensor, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A sum gets the value of a mean, in the dtype of x, and keeps its gradients.

    Plain PyTorch's error of one number is chance. Gradients of a mean would be lost in the rounding
    of its value.
    """
    if loss.dim():
        return {"losses": loss}
    value = loss.detach()
    return {"mean": (value / len(given["x"]) + (loss - value)).to(given["x"].dtype)}


PROOF = proving.Proof(family, inputs, kernel, formula)
