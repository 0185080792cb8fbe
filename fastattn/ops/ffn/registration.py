"""The kernel backends' way in: `torch.ops.fastattn.ffn` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses anew.

The forward returns (out, pre), pre = x w1 + b1 of shape (tokens, hidden), which is what a backward
wants; it has no elements unless `save_pre`. The backward computes what `needs` asks for (x, w1, b1,
w2, b2); the other gradients have no elements.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd, flops
from fastattn.ops.ffn import reference
from fastattn.ops.ffn.matrices import gradient_like
from fastattn.ops.ffn.problem import FFNProblem, describe

BACKENDS = backends.of_op("fastattn.ops.ffn")

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str layout, "
    "bool save_pre, str backend, bool forced) -> (Tensor out, Tensor pre)"
)
_library.define(
    "ffn_backward(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? pre, bool[5] needs, str activation, str layout, str backend, bool forced) "
    "-> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)"
)


def run_kernel(
    backend: str,
    forced: bool,
    problem: FFNProblem,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> torch.Tensor:
    """A call on a kernel backend."""
    if problem.autocast:
        x, w1, w2 = (t.to(problem.dtype) for t in (x, w1, w2))
        b1, b2 = (t if t is None else t.to(problem.dtype) for t in (b1, b2))
    save_pre = problem.needs_grad and not problem.recompute
    return torch.ops.fastattn.ffn(
        x, w1, b1, w2, b2, problem.activation, problem.layout, save_pre, backend, forced
    )[0]


# --- forward ------------------------------------------------------------------------------------


def _forward(x, w1, b1, w2, b2, activation, layout, save_pre, backend, forced):  # type: ignore[no-untyped-def]
    kernel = backends.module_of(BACKENDS, backend)
    return kernel.forward(x, w1, b1, w2, b2, activation, layout, save_pre)


def _forward_fake(x, w1, b1, w2, b2, activation, layout, save_pre, backend, forced):  # type: ignore[no-untyped-def]
    hidden, out_features = (0, 0) if layout == "linear" else (1, 1)
    leading = x.shape[:-1]
    tokens = 1
    for size in leading:
        tokens = tokens * size
    pre = x.new_empty((tokens, w1.shape[hidden]) if save_pre else (0,))
    return x.new_empty((*leading, w2.shape[out_features])), pre


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, w1, b1, w2, b2, activation, layout, save_pre, backend, forced = inputs
    _, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, w1, b1, w2, b2, pre if save_pre else None)
    ctx.options = (activation, layout, backend, forced)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 10
    needs = ctx.needs_input_grad[:5]
    grads = torch.ops.fastattn.ffn_backward(dout, *ctx.saved_tensors, needs, *ctx.options)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *wanted, *(None,) * 5


# --- backward -----------------------------------------------------------------------------------


def _backward(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, pre, needs, activation, layout, backend, forced
):
    problem = describe(x, w1, b1, w2, b2, activation, layout=layout)
    kernel = backends.select_backward("ffn", BACKENDS, problem, backend, forced)
    return kernel.backward(dout, x, w1, b1, w2, b2, pre, needs, activation, layout)


def _backward_fake(  # type: ignore[no-untyped-def]
    dout, x, w1, b1, w2, b2, pre, needs, activation, layout, backend, forced
):
    dx, dw1, db1, dw2, db2 = needs
    nothing = (0,)
    return (
        x.new_empty(x.shape if dx else nothing),
        gradient_like(w1) if dw1 else x.new_empty(nothing),
        x.new_empty(b1.shape if db1 else nothing),
        gradient_like(w2) if dw2 else x.new_empty(nothing),
        x.new_empty(b2.shape if db2 else nothing),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, x, w1, b1, w2, b2, _, ctx.needs, ctx.activation, ctx.layout, _, _ = inputs
    ctx.save_for_backward(dout, x, w1, b1, w2, b2)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    def gradients(
        dout: Any, x: Any, w1: Any, b1: Any, w2: Any, b2: Any
    ) -> list[torch.Tensor | None]:
        problem = describe(x, w1, b1, w2, b2, ctx.activation, layout=ctx.layout)
        out = reference.forward(problem, x, w1, b1, w2, b2)
        wanted = [t if need else None for t, need in zip((x, w1, b1, w2, b2), ctx.needs)]
        return autograd.first_derivative([out], wanted, [dout])

    return *autograd.double_backward(gradients, ctx.saved_tensors, directions), *(None,) * 6


torch.library.register_fake("fastattn::ffn", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::ffn_backward", _backward_fake, lib=_library)
autograd.register(_library, "ffn", _forward, _setup_context, _autograd)
autograd.register(_library, "ffn_backward", _backward, _backward_setup_context, _double_backward)


# --- floating-point operations --------------------------------------------------------------------


def _flops(x, w1, b1, w2, *rest):  # type: ignore[no-untyped-def]
    tokens = x.numel() // max(1, x.shape[-1])
    return 2 * tokens * (w1.numel() + w2.numel())


def _backward_flops(dout, x, w1, b1, w2, b2, pre, needs, *rest):  # type: ignore[no-untyped-def]
    dx, dw1, db1, dw2, _ = needs
    through = dx or dw1 or db1
    # Of w1's size: pre again, dx, dw1. Of w2's: the hidden layer's gradient, dw2.
    first = (pre is None and (through or dw2)) + dx + dw1
    second = through + dw2
    tokens = x.numel() // max(1, x.shape[-1])
    return 2 * tokens * (first * w1.numel() + second * w2.numel())


flops.register("ffn", _flops)
flops.register("ffn_backward", _backward_flops)
