"""The kernel backends' way in: `torch.ops.fastattn.linear` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses again.

The forward returns (out, pre), pre = x weight^T + bias of shape (tokens, out_features), which is
what a backward wants; it has no elements unless `save_pre`. The backward computes what `needs` asks
for (x, weight, bias); the other gradients have no elements.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd, flops
from fastattn.ops.common.matrices import gradient_like
from fastattn.ops.linear import reference
from fastattn.ops.linear.problem import LinearProblem, describe

BACKENDS = backends.of_op("fastattn.ops.linear", without=("gluon", "cuda"))


def run_kernel(
    backend: str,
    forced: bool,
    problem: LinearProblem,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A call on a kernel backend."""
    tensors = [x, weight, bias]
    if problem.autocast:
        tensors = [t if t is None else t.to(problem.dtype) for t in tensors]
    return torch.ops.fastattn.linear(
        *tensors, problem.activation, problem.needs_grad, backend, forced
    )[0]


# --- forward ------------------------------------------------------------------------------------


def _forward(x, weight, bias, activation, save_pre, backend, forced):  # type: ignore[no-untyped-def]
    kernel = backends.module_of(BACKENDS, backend)
    return kernel.forward(x, weight, bias, activation, save_pre)


def _forward_fake(x, weight, bias, activation, save_pre, backend, forced):  # type: ignore[no-untyped-def]
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    pre = x.new_empty((tokens, weight.shape[0]) if save_pre else (0,))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), pre


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, activation, save_pre, backend, forced = inputs
    _, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(*tensors, pre if save_pre else None)
    ctx.options = (activation, backend, forced)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.fastattn.linear_backward(dout, *ctx.saved_tensors, needs, *ctx.options)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, *(None,) * 4


# --- backward -----------------------------------------------------------------------------------


def _backward(dout, x, weight, bias, pre, needs, activation, backend, forced):  # type: ignore[no-untyped-def]
    problem = describe(x, weight, bias, activation)
    kernel = backends.select_backward("linear", BACKENDS, problem, backend, forced)
    return kernel.backward(dout, x, weight, bias, pre, needs, activation)


def _backward_fake(dout, x, weight, bias, pre, needs, activation, backend, forced):  # type: ignore[no-untyped-def]
    dx, dweight, dbias = needs
    nothing = (0,)
    return (
        x.new_empty(x.shape if dx else nothing),
        gradient_like(weight) if dweight else x.new_empty(nothing),
        x.new_empty(bias.shape if dbias else nothing),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, ctx.needs, ctx.activation, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    def gradients(dout: Any, *tensors: Any) -> list[torch.Tensor | None]:
        x, weight, bias = tensors
        out = reference.forward(describe(x, weight, bias, ctx.activation), x, weight, bias)
        wanted = [t if need else None for t, need in zip(tensors, ctx.needs, strict=True)]
        return autograd.first_derivative([out], wanted, [dout])

    return *autograd.double_backward(gradients, ctx.saved_tensors, directions), *(None,) * 5


autograd.register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre, str backend, "
    "bool forced) -> (Tensor out, Tensor pre)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? pre, "
    "bool[3] needs, str activation, str backend, bool forced) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip

# --- floating-point operations --------------------------------------------------------------------


def _flops(x, weight, *rest):  # type: ignore[no-untyped-def]
    return 2 * x.numel() * weight.shape[0]


def _backward_flops(dout, x, weight, bias, pre, needs, *rest):  # type: ignore[no-untyped-def]
    dx, dweight, dbias = needs
    again = pre is None and (dx or dweight or dbias)
    return (again + dx + dweight) * _flops(x, weight)


flops.register("linear", _flops)
flops.register("linear_backward", _backward_flops)
