"""The kernels' way in: `torch.ops.fastattn.linear_cross_entropy` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. The result is the sum of the losses if it is to be `summed`, else the losses
(...), float32, for float64 inputs float64. `backend` names who runs the forward; if the user named
it (`forced`), the backward stays on it too, else the backward chooses again. "torch" runs the
chunks of aten.py.

Kept for the backward are the inputs, and those gradients of the sum that the forward has made
because `keep` asked for them, or else the statistics (2, ...) of Triton's forward. The gradients
have their inputs' dtypes, for float16 parameters float32. What a call does not have is an empty
tensor.

The first backward gives such gradients away: it multiplies them in place by the gradient of the
sum, and autograd gets the only reference. So the weight's becomes its `.grad` without a copy, and
where the weight is an embedding too, that gradient is added to this buffer. A second backward
through the same graph (retain_graph=True) makes the gradients again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd, flops, modes, recovery
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.cross_entropy.reference import token_losses
from fastattn.ops.linear_cross_entropy.aten import of_operator
from fastattn.ops.linear_cross_entropy.gradients import dtype_of_sum
from fastattn.ops.linear_cross_entropy.problem import LinearLossProblem, describe

BACKENDS = backends.of_op("fastattn.ops.linear_cross_entropy", without=("cuda",))


def run_kernel(
    backend: str, forced: bool, problem: LinearLossProblem, *tensors: torch.Tensor | None
) -> torch.Tensor:
    """A call on a kernel backend."""
    return of_operator(problem, backend, forced, *tensors)  # type: ignore[arg-type]


# --- forward ------------------------------------------------------------------------------------


def _forward(x, weight, bias, targets, class_weight, summed, keep, *rest):  # type: ignore[no-untyped-def]
    *settings, backend, forced = rest
    tensors, options = (x, weight, bias, targets, class_weight), Options.of_operator(settings)
    try:
        kernel = backends.module_of(BACKENDS, backend)
        losses, statistics, gradients = kernel.kernel_forward(*tensors, options, keep)
    except Exception as error:
        problem = _problem(*tensors, settings)
        families = _families(problem, keep) if any(keep) else _families_of_losses(problem)
        name = recovery.next_kernel(error, BACKENDS, backend, forced, problem, families)
    else:
        return (losses.sum() if summed else losses), *(
            losses.new_empty(0) if t is None else t for t in (statistics, *gradients)
        )
    return _forward(*tensors, summed, keep, *settings, name, forced)


def _families(problem: LinearLossProblem, keep: Sequence[bool]) -> list[LinearLossProblem]:
    """The calls of one number whose gradients the forward makes."""
    options = problem.options._replace(reduction="sum")
    return [_needing(dataclasses.replace(problem, options=options), *keep)]


def _families_of_losses(problem: LinearLossProblem) -> list[LinearLossProblem]:
    """The calls that the same forward runs; the operator does not know which of them it is."""
    every = itertools.product((False, True), (False, True), {False, problem.has_bias})
    return [*_families(problem, (False,) * 3), *(_needing(problem, *needs) for needs in every)]


def _needing(problem: LinearLossProblem, x: bool, weight: bool, bias: bool) -> LinearLossProblem:
    needs = x, weight, bias
    return dataclasses.replace(problem, needs=needs, needs_grad=any(needs))


def _forward_fake(x, weight, bias, targets, class_weight, summed, keep, *rest):  # type: ignore[no-untyped-def]
    dtype, of_sum = modes.at_least_float32(x.dtype), dtype_of_sum(x.dtype)
    kept = (0,) if rest[-2] == "torch" or any(keep) else (2, *targets.shape)
    return (
        x.new_empty(() if summed else targets.shape, dtype=dtype),
        x.new_empty(kept, dtype=dtype),
        x.new_empty(x.shape) if keep[0] else x.new_empty(0, dtype=dtype),
        x.new_empty(weight.shape, dtype=of_sum) if keep[1] else x.new_empty(0, dtype=dtype),
        x.new_empty(bias.shape, dtype=of_sum) if keep[2] else x.new_empty(0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, (ctx.summed, ctx.keep, *ctx.rest) = inputs[:5], inputs[5:]
    _, statistics, *gradients = output
    ctx.mark_non_differentiable(statistics, *gradients)
    ctx.save_for_backward(*tensors, statistics)
    ctx.gradients = gradients
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dloss: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    if dloss is None:
        return (None,) * 14
    kept = any(needs) and all(keep or not need for keep, need in zip(ctx.keep, needs, strict=True))
    if kept and not torch.is_grad_enabled():
        grads = _given_away(ctx, dloss)
    else:
        x, weight, bias, targets, class_weight, statistics = ctx.saved_tensors
        dlosses = dloss.expand(targets.shape) if ctx.summed else dloss
        grads = torch.ops.fastattn.linear_cross_entropy_backward(
            dlosses, x, weight, bias, targets, class_weight, statistics, needs, *ctx.rest
        )
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, *(None,) * 11


def _given_away(ctx: Any, dloss: torch.Tensor) -> list[torch.Tensor]:
    """The gradients that the forward has made, times that of the sum; they are there only once."""
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        *tensors, _ = ctx.saved_tensors
        _, _, *gradients = torch.ops.fastattn.linear_cross_entropy(
            *tensors, ctx.summed, ctx.keep, *ctx.rest
        )
    in_place = not (modes.recorded() or modes.transformed())
    # Without a dimension it would be rounded to the gradient's 16 bits first, if not on a CPU.
    factor = dloss if in_place and dloss.is_cpu else dloss.reshape(1)
    scaled: list[torch.Tensor] = []
    while gradients:  # so that nobody else holds one
        gradient, dtype = gradients.pop(0), ctx.dtypes[len(scaled)]
        gradient = gradient.mul_(factor) if in_place else gradient * factor
        scaled.append(gradient.to(dtype))
    return scaled


# --- backward -----------------------------------------------------------------------------------


def _backward(  # type: ignore[no-untyped-def]
    dlosses, x, weight, bias, targets, class_weight, statistics, needs, *rest
):
    *settings, backend, forced = rest
    tensors, options = (x, weight, bias, targets, class_weight), Options.of_operator(settings)
    if backend == "torch":
        kernel = backends.module_of(BACKENDS, backend)
    else:
        problem = _problem(*tensors, settings)
        kernel = backends.select_backward(problem.op, BACKENDS, problem, backend, forced)
    try:
        known = statistics if statistics.numel() else None
        gradients = kernel.kernel_backward(dlosses, *tensors, known, options, needs)
    except Exception as error:
        problem = _problem(*tensors, settings)
        families = [_needing(problem, *needs)]
        name = backends.name_of(BACKENDS, kernel)
        name = recovery.next_kernel(error, BACKENDS, name, forced, problem, families, backward=True)
    else:
        return tuple(
            x.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
            for tensor, gradient in zip((x, weight, bias), gradients, strict=True)
        )
    return _backward(dlosses, *tensors, statistics, needs, *settings, name, forced)


def _backward_fake(  # type: ignore[no-untyped-def]
    dlosses, x, weight, bias, targets, class_weight, statistics, needs, *rest
):
    return tuple(
        tensor.new_empty(tensor.shape) if need else x.new_empty(0)
        for tensor, need in zip((x, weight, bias), needs, strict=True)
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, ctx.needs = inputs[:8]
    ctx.settings = inputs[8:-2]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    dlosses, x, weight, bias, targets, class_weight = ctx.saved_tensors
    options = Options.of_operator(ctx.settings)

    def gradients(dlosses: Any, *inputs: Any) -> list[torch.Tensor | None]:
        losses = token_losses(torch.nn.functional.linear(*inputs), targets, class_weight, options)
        wanted = [t if need else None for t, need in zip(inputs, ctx.needs, strict=True)]
        return autograd.first_derivative([losses], wanted, [dlosses])

    second = autograd.double_backward(gradients, (dlosses, x, weight, bias), directions)
    return *second, *(None,) * 11


def _problem(
    x: Any, weight: Any, bias: Any, targets: Any, class_weight: Any, settings: list[Any]
) -> LinearLossProblem:
    named = Options.of_operator(settings)._asdict()
    return describe(x, weight, targets, bias, class_weight=class_weight, **named)


SETTINGS = (
    "int ignore_index, float label_smoothing, float z_loss, float logit_scale, float softcap, "
    "str backend, bool forced"
)
autograd.register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, "
    f"Tensor? class_weight, bool summed, bool[3] keep, {SETTINGS}) "
    "-> (Tensor loss, Tensor statistics, Tensor dx, Tensor dweight, Tensor dbias)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "linear_cross_entropy_backward(Tensor dlosses, Tensor x, Tensor weight, Tensor? bias, "
    f"Tensor targets, Tensor? class_weight, Tensor statistics, bool[3] needs, {SETTINGS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip

# --- floating-point operations --------------------------------------------------------------------


def _flops(x, weight, bias, targets, class_weight, summed, keep, *rest):  # type: ignore[no-untyped-def]
    """The logits, and dx and dweight where the forward makes them."""
    return 2 * targets.numel() * weight.numel() * (1 + keep[0] + keep[1])


def _backward_flops(  # type: ignore[no-untyped-def]
    dlosses, x, weight, bias, targets, class_weight, statistics, needs, *rest
):
    """The logits again, dx and dweight."""
    return 2 * targets.numel() * weight.numel() * (1 + needs[0] + needs[1])


flops.register("linear_cross_entropy", _flops)
flops.register("linear_cross_entropy_backward", _backward_flops)
