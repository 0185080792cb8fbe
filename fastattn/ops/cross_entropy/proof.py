"""How the kernels of cross_entropy prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn import proving
from fastattn.ops.cross_entropy import reference, registration
from fastattn.ops.cross_entropy.problem import IGNORED, LossProblem, Options, describe

ROWS = 37
FEWEST, MOST = 40, 8000  # classes


def family(problem: LossProblem) -> str | None:
    """All features that select a kernel; a reduction does not, it follows."""
    if 0 in problem.shape:
        return None
    facts = [
        str(problem.dtype).removeprefix("torch."),
        "" if problem.weight_dtype is None else "weight",
        *of_options(problem.options),
        f"{classes_of(problem)} classes",
        "with gradients" if problem.needs_grad else "",
    ]
    return ", ".join(filter(None, facts))


def of_options(options: Options) -> list[str]:
    """The options that a loss has, in words."""
    small, plain = options_of(options), Options(IGNORED, 0.0, 0.0, 1.0, 0.0, "none")
    return [name for name, x in small._asdict().items() if x != getattr(plain, name)]


def options_of(options: Options, reduction: str = "none") -> Options:
    """The options of a small problem: those of the call that are not off have one value."""
    return Options(
        ignore_index=IGNORED,
        label_smoothing=0.125 if options.label_smoothing else 0.0,
        z_loss=0.01 if options.z_loss else 0.0,
        logit_scale=0.75 if options.logit_scale != 1.0 else 1.0,
        softcap=3.0 if options.softcap else 0.0,
        reduction=reduction,
    )


def classes_of(problem: LossProblem) -> int:
    """The classes of the small problem: kernels are chosen by powers of two."""
    classes = min(max(int(problem.shape[-1]), FEWEST), MOST)
    power = 1 << (classes - 1).bit_length()
    return power - power // 8


def targets_of(rows: int, classes: int, device: torch.device) -> torch.Tensor:
    """A class for each row, the first, the last and one that is ignored among them."""
    targets = torch.arange(rows, device=device) * 7919 % classes
    targets[1], targets[2] = classes - 1, IGNORED
    return targets


def inputs(problem: LossProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of the problem's kind.

    The logits of the targets are a tensor of their own: their gradients are so large that beside
    them the numeric rule would not see the others.
    """
    classes = classes_of(problem)
    given: dict[str, Any] = {
        "others": draw(ROWS, classes),
        "of_targets": draw(ROWS, 1),
        "weight": None if problem.weight_dtype is None else draw(classes).abs(),
        "targets": targets_of(ROWS, classes, problem.device),
    }
    for name in ("others", "of_targets"):
        given[name].requires_grad_(problem.needs_grad)
    return given


def kernel(problem: LossProblem, given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The losses, from a backend."""
    logits, targets, weight, options = _call(problem, given)
    small = describe(logits, targets, weight=weight, **options._asdict())
    return {"losses": registration.run_kernel(backend, True, small, logits, targets, weight)}


def formula(problem: LossProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The losses, in float32 or the dtype of the tensors, as plain PyTorch has them."""
    return {"losses": reference.token_losses(*_call(problem, given))}


def _call(
    problem: LossProblem, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Options]:
    targets = given["targets"]
    index = targets.clamp(min=0)[:, None]
    logits = given["others"].scatter(1, index, given["of_targets"])
    return logits, targets, given["weight"], options_of(problem.options)


PROOF = proving.Proof(family, inputs, kernel, formula)
