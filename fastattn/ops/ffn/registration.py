"""The kernel backends' way in: `torch.ops.fastattn.ffn` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses again.

The forward returns (out, pre), pre = x w1 + b1 of shape (tokens, hidden), which is what a backward
wants; with a gate (2, tokens, hidden), x gate + gate_bias after it. It has no elements unless
`save_pre`. The backward computes what `needs` asks for (x, w1, b1, w2, b2, gate, gate_bias); the
other gradients have no elements.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd, flops, recovery
from fastattn.ops.common.matrices import gradient_like
from fastattn.ops.ffn import reference
from fastattn.ops.ffn.problem import FFNProblem, describe

BACKENDS = backends.of_op("fastattn.ops.ffn")


def run_kernel(
    backend: str,
    forced: bool,
    problem: FFNProblem,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> torch.Tensor:
    """A call on a kernel backend."""
    tensors = [x, w1, b1, w2, b2, gate, gate_bias]
    if problem.autocast:
        tensors = [t if t is None else t.to(problem.dtype) for t in tensors]
    save_pre = problem.needs_grad and not problem.recompute
    return torch.ops.fastattn.ffn(
        *tensors, problem.activation, problem.layout, save_pre, backend, forced
    )[0]


# --- forward ------------------------------------------------------------------------------------


def _forward(  # type: ignore[no-untyped-def]
    x, w1, b1, w2, b2, gate, gate_bias, activation, layout, save_pre, backend, forced
):
    tensors = x, w1, b1, w2, b2, gate, gate_bias
    try:
        kernel = backends.module_of(BACKENDS, backend)
        return kernel.forward(*tensors, activation, layout, save_pre)
    except Exception as error:
        problem = _problem(tensors, activation, layout)
        families = _families(problem)
        name = recovery.next_kernel(error, BACKENDS, backend, forced, problem, families)
    return _forward(*tensors, activation, layout, save_pre, name, forced)


def _families(problem: FFNProblem) -> list[FFNProblem]:
    """The calls that the same kernels run; the operator does not know which of them it is."""
    return [
        dataclasses.replace(problem, needs_grad=needs_grad, recompute=recompute)
        for needs_grad in (False, True)
        for recompute in (False, True)
    ]


def _forward_fake(  # type: ignore[no-untyped-def]
    x, w1, b1, w2, b2, gate, gate_bias, activation, layout, save_pre, backend, forced
):
    hidden, out_features = (0, 0) if layout == "linear" else (1, 1)
    leading = x.shape[:-1]
    tokens = 1
    for size in leading:
        tokens = tokens * size
    shape = (tokens, w1.shape[hidden]) if gate is None else (2, tokens, w1.shape[hidden])
    pre = x.new_empty(shape if save_pre else (0,))
    return x.new_empty((*leading, w2.shape[out_features])), pre


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, activation, layout, save_pre, backend, forced = inputs
    _, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(*tensors, pre if save_pre else None)
    ctx.options = (activation, layout, backend, forced)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 12
    needs = ctx.needs_input_grad[:7]
    grads = torch.ops.fastattn.ffn_backward(dout, *ctx.saved_tensors, needs, *ctx.options)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, *(None,) * 5


# --- backward -----------------------------------------------------------------------------------


def _backward(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, gate, gate_bias, pre, needs, activation, layout, backend, forced
):
    tensors = x, w1, b1, w2, b2, gate, gate_bias
    problem = _problem(tensors, activation, layout)
    kernel = backends.select_backward("ffn", BACKENDS, problem, backend, forced)
    try:
        return kernel.backward(dout, *tensors, pre, needs, activation, layout)
    except Exception as error:
        families = [x for x in _families(problem) if x.needs_grad]
        name = backends.name_of(BACKENDS, kernel)
        name = recovery.next_kernel(error, BACKENDS, name, forced, problem, families, backward=True)
    return _backward(dout, *tensors, pre, needs, activation, layout, name, forced)


def _backward_fake(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, gate, gate_bias, pre, needs, activation, layout, backend, forced
):
    dx, dw1, db1, dw2, db2, dgate, dgate_bias = needs
    nothing = (0,)
    return (
        x.new_empty(x.shape if dx else nothing),
        gradient_like(w1) if dw1 else x.new_empty(nothing),
        x.new_empty(b1.shape if db1 else nothing),
        gradient_like(w2) if dw2 else x.new_empty(nothing),
        x.new_empty(b2.shape if db2 else nothing),
        gradient_like(gate) if dgate else x.new_empty(nothing),
        x.new_empty(gate_bias.shape if dgate_bias else nothing),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, ctx.needs, ctx.activation, ctx.layout, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    def gradients(dout: Any, *tensors: Any) -> list[torch.Tensor | None]:
        problem = _problem(tensors, ctx.activation, ctx.layout)
        out = reference.forward(problem, *tensors)
        wanted = [t if need else None for t, need in zip(tensors, ctx.needs, strict=True)]
        return autograd.first_derivative([out], wanted, [dout])

    return *autograd.double_backward(gradients, ctx.saved_tensors, directions), *(None,) * 6


def _problem(tensors: tuple[Any, ...], activation: str, layout: str) -> FFNProblem:
    x, w1, b1, w2, b2, gate, gate_bias = tensors
    gates = {"gate": gate, "gate_bias": gate_bias}
    return describe(x, w1, b1, w2, b2, activation, layout=layout, **gates)


autograd.register(
    "ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate, Tensor? gate_bias, "
    "str activation, str layout, bool save_pre, str backend, bool forced) "
    "-> (Tensor out, Tensor pre)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "ffn_backward(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? gate, Tensor? gate_bias, Tensor? pre, bool[7] needs, str activation, str layout, "
    "str backend, bool forced) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, "
    "Tensor dgate, Tensor dgate_bias)",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip

# --- floating-point operations --------------------------------------------------------------------


def _flops(x, w1, b1, w2, b2, gate, *rest):  # type: ignore[no-untyped-def]
    tokens = x.numel() // max(1, x.shape[-1])
    into = 1 if gate is None else 2
    return 2 * tokens * (into * w1.numel() + w2.numel())


def _backward_flops(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, gate, gate_bias, pre, needs, *rest
):
    dx, dw1, db1, dw2, _, dgate, dgate_bias = needs
    through = dx or dw1 or db1 or dgate or dgate_bias
    into = 1 if gate is None else 2
    # Of w1's size: pre again, dx, dw1, dgate. Of w2's: the hidden layer's gradient, dw2.
    first = into * (pre is None and (through or dw2)) + into * dx + dw1 + dgate
    second = through + dw2
    tokens = x.numel() // max(1, x.shape[-1])
    return 2 * tokens * (first * w1.numel() + second * w2.numel())


flops.register("ffn", _flops)
flops.register("ffn_backward", _backward_flops)
