"""The kernels' way in: `torch.ops.fastattn.cross_entropy` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. The operator has no reduction: its results are the losses (...) and, for the
backward, the statistics (2, ...) of Triton's forward, both float32, for float64 logits float64.
`backend` names who runs the forward; if the user named it (`forced`), the backward stays on it too,
else the backward chooses again. "torch" runs the blocks of aten.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd, modes
from fastattn.ops.cross_entropy import reference
from fastattn.ops.cross_entropy.problem import LossProblem, Options, check_classes, describe

BACKENDS = backends.of_op("fastattn.ops.cross_entropy", without=("gluon", "cuda"))


def run_kernel(
    backend: str,
    forced: bool,
    problem: LossProblem,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """A call on a kernel backend."""
    options = problem.options
    check_classes(targets, options.ignore_index, logits.shape[-1])
    losses, _ = torch.ops.fastattn.cross_entropy(
        logits, targets, weight, *options[:-1], backend, forced
    )
    return reference.reduce(losses, targets, weight, options)


# --- forward ------------------------------------------------------------------------------------


def _forward(logits, targets, weight, *rest):  # type: ignore[no-untyped-def]
    *settings, backend, _ = rest
    kernel = backends.module_of(BACKENDS, backend)
    losses, statistics = kernel.kernel_forward(
        logits, targets, weight, Options.of_operator(settings)
    )
    return losses, losses.new_empty(0) if statistics is None else statistics


def _forward_fake(logits, targets, weight, *rest):  # type: ignore[no-untyped-def]
    dtype = modes.at_least_float32(logits.dtype)
    losses = logits.new_empty(targets.shape, dtype=dtype)
    kept = (0,) if rest[-2] == "torch" else (2, *targets.shape)
    return losses, losses.new_empty(kept)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, weight, *ctx.rest = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(logits, targets, weight, statistics)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dlosses: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if dlosses is None:
        return None, *nothing
    dlogits = torch.ops.fastattn.cross_entropy_backward(dlosses, *ctx.saved_tensors, *ctx.rest)
    return dlogits, *nothing


# --- backward -----------------------------------------------------------------------------------


def _backward(dlosses, logits, targets, weight, statistics, *rest):  # type: ignore[no-untyped-def]
    *settings, backend, forced = rest
    kernel = _of_backward(_problem(logits, targets, weight, settings), backend, forced)
    options = Options.of_operator(settings)
    return kernel.kernel_backward(dlosses, logits, targets, weight, statistics, options)


def _of_backward(problem: LossProblem, backend: str, forced: bool) -> ModuleType:
    if backend == "torch":
        return backends.module_of(BACKENDS, backend)
    return backends.select_backward(problem.op, BACKENDS, problem, backend, forced)


def _backward_fake(dlosses, logits, targets, weight, statistics, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dlosses, logits, targets, weight, _, *ctx.settings, _, _ = inputs
    ctx.save_for_backward(dlosses, logits, targets, weight)


def _double_backward(ctx: Any, direction: torch.Tensor) -> tuple[Any, ...]:
    dlosses, logits, targets, weight = ctx.saved_tensors

    def gradients(dlosses: Any, logits: Any) -> list[torch.Tensor | None]:
        losses = reference.token_losses(logits, targets, weight, Options.of_operator(ctx.settings))
        return autograd.first_derivative([losses], [logits], [dlosses])

    second = autograd.double_backward(gradients, (dlosses, logits), [direction])
    return *second, *(None,) * 10


def _problem(logits: Any, targets: Any, weight: Any, settings: list[Any]) -> LossProblem:
    named = Options.of_operator(settings)._asdict()
    return describe(logits, targets, weight=weight, **named)


SETTINGS = (
    "int ignore_index, float label_smoothing, float z_loss, float logit_scale, float softcap, "
    "str backend, bool forced"
)
autograd.register(
    f"cross_entropy(Tensor logits, Tensor targets, Tensor? weight, {SETTINGS}) "
    "-> (Tensor losses, Tensor statistics)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor targets, Tensor? weight, "
    f"Tensor statistics, {SETTINGS}) -> Tensor dlogits",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip
