"""The kernel backends' way in: `torch.ops.fastattn.layer_norm` and its backward.

One pair of ops is both norms: `center` tells layer_norm from rms_norm. Opaque to torch.compile,
with fake implementations for tracing and autograd formulas up to the second derivative. `backend`
names who runs the forward; if the user named it (`forced`), the backward stays on it too, else the
backward chooses again.

The seed of dropout is drawn outside of the op, whose results so depend on nothing but its inputs.
Absent tensors are empty ones: `stream` without a residual (it is x), and gradients
that nobody asked for. `statistics` is rstd and, for layer_norm, mean: (2 or 1, ...) float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd, dropout, recovery
from fastattn.ops.layer_norm import reference, results
from fastattn.ops.layer_norm.problem import NormProblem, describe

BACKENDS = backends.of_op("fastattn.ops.layer_norm", without=("gluon",))


def run_kernel(
    backend: str,
    forced: bool,
    problem: NormProblem,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, stream) of a call on a kernel backend; a seed of dropout that is not given is drawn."""
    if problem.dropout_p and seed is None:
        seed = dropout.draw_seed(x.device)
    out, stream, _ = torch.ops.fastattn.layer_norm(
        x, residual, weight, bias, seed, problem.dropout_p, problem.eps, problem.center,
        problem.out_dtype, backend, forced,
    )  # fmt: skip
    return out, stream


# --- forward ------------------------------------------------------------------------------------


def _forward(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, seed, dropout_p, eps, center, out_dtype, backend, forced
):
    try:
        kernel = backends.module_of(BACKENDS, backend)
        return kernel.forward(x, residual, weight, bias, eps, center, out_dtype, seed, dropout_p)
    except Exception as error:
        problem = describe(x, weight, bias, eps, residual, dropout_p, center=center)
        problem = dataclasses.replace(problem, out_dtype=out_dtype)
        name = recovery.next_kernel(error, BACKENDS, backend, forced, problem, [problem])
    return _forward(
        x, residual, weight, bias, seed, dropout_p, eps, center, out_dtype, name, forced
    )


def _forward_fake(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, seed, dropout_p, eps, center, out_dtype, backend, forced
):
    return results.of_forward(x, residual, center, out_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, seed, ctx.dropout_p, ctx.eps, ctx.center, _, *ctx.choice = inputs
    _, stream, statistics = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else stream, weight, statistics, seed)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any,
    dout: torch.Tensor | None,
    dstream: torch.Tensor | None,
    dstatistics: None,
) -> tuple[Any, ...]:
    stream, weight, statistics, seed = ctx.saved_tensors
    if ctx.residual_dtype is None:
        dstream = None  # x has no second way out; the op's `stream` was empty
    rest = (None,) * 7
    if dout is None:
        if dstream is None:
            return (None,) * 11
        dx = _dropped(dstream, seed, ctx.dropout_p).to(ctx.x_dtype)
        return dx, dstream.to(ctx.residual_dtype), None, None, *rest
    _, residual_grad, weight_grad, bias_grad = ctx.needs_input_grad[:4]
    dx, dresidual, dweight, dbias = torch.ops.fastattn.layer_norm_backward(
        dout, dstream, stream, weight, statistics, seed, ctx.dropout_p, ctx.eps, ctx.center,
        ctx.x_dtype, ctx.residual_dtype, ctx.bias_dtype if bias_grad else None, weight_grad,
        *ctx.choice,
    )  # fmt: skip
    if ctx.residual_dtype == ctx.x_dtype and seed is None:
        dresidual = dx
    return (
        dx,
        dresidual if residual_grad else None,
        dweight if weight_grad else None,
        dbias if bias_grad else None,
        *rest,
    )


# --- backward -----------------------------------------------------------------------------------


def _backward(  # type: ignore[no-untyped-def]
    dout, dstream, stream, weight, statistics, seed, dropout_p, eps, center, x_dtype,
    residual_dtype, bias_dtype, weight_grad, backend, forced,
):  # fmt: skip
    problem = describe(stream, weight, None, eps, None, center=center)
    problem = dataclasses.replace(problem, dropout_p=dropout_p)
    kernel = backends.select_backward(problem.op, BACKENDS, problem, backend, forced)
    try:
        return kernel.backward(
            dout, dstream, stream, weight, statistics, center, x_dtype, residual_dtype, bias_dtype,
            weight_grad, seed, dropout_p,
        )  # fmt: skip
    except Exception as error:
        forward = dataclasses.replace(
            problem, dtype=x_dtype, residual_dtype=residual_dtype, out_dtype=dout.dtype
        )
        # A bias without a gradient is not known here.
        biases = {bias_dtype, problem.weight_dtype if center else None}
        families = [dataclasses.replace(forward, bias_dtype=dtype) for dtype in biases]
        name = backends.name_of(BACKENDS, kernel)
        name = recovery.next_kernel(error, BACKENDS, name, forced, problem, families, backward=True)
    return _backward(
        dout, dstream, stream, weight, statistics, seed, dropout_p, eps, center, x_dtype,
        residual_dtype, bias_dtype, weight_grad, name, forced,
    )  # fmt: skip


def _backward_fake(  # type: ignore[no-untyped-def]
    dout, dstream, stream, weight, statistics, seed, dropout_p, eps, center, x_dtype,
    residual_dtype, bias_dtype, weight_grad, backend, forced,
):  # fmt: skip
    return results.of_backward(
        stream, weight, x_dtype, residual_dtype, bias_dtype, weight_grad, dropout_p
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, dstream, stream, weight, _, seed, ctx.dropout_p, *options, _, _ = inputs
    ctx.eps, ctx.center, *ctx.gradients = options
    ctx.save_for_backward(dout, dstream, stream, weight, seed)
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    x_dtype, residual_dtype, bias_dtype, weight_grad = ctx.gradients
    *tensors, seed = ctx.saved_tensors

    def gradients(dout: Any, dstream: Any, stream: Any, weight: Any) -> list[torch.Tensor | None]:
        bias = None
        if bias_dtype is not None:
            bias = stream.new_zeros(stream.shape[-1], dtype=bias_dtype, requires_grad=True)
        problem = describe(stream, weight, bias, ctx.eps, None, center=ctx.center)
        problem = dataclasses.replace(problem, out_dtype=dout.dtype)
        out, _ = reference.forward(problem, stream, weight, bias, None)
        inputs = [stream, weight if weight_grad else None, bias]
        ds, dweight, dbias = autograd.first_derivative([out], inputs, [dout])
        assert ds is not None
        if dstream is not None:
            ds = ds + dstream
        dresidual = None
        if residual_dtype is not None and (residual_dtype != x_dtype or seed is not None):
            dresidual = ds.to(residual_dtype)
        return [_dropped(ds, seed, ctx.dropout_p).to(x_dtype), dresidual, dweight, dbias]

    return *autograd.double_backward(gradients, tensors, directions), *(None,) * 11


def _dropped(ds: torch.Tensor, seed: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
    """The gradient of x, of the stream's; differentiable."""
    if seed is None:
        return ds
    return reference.dropped(ds, seed, dropout_p)


autograd.register(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? dropout_seed, "
    "float dropout_p, float eps, bool center, ScalarType out_dtype, str backend, bool forced) "
    "-> (Tensor out, Tensor stream, Tensor statistics)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "layer_norm_backward(Tensor dout, Tensor? dstream, Tensor stream, Tensor? weight, "
    "Tensor statistics, Tensor? dropout_seed, float dropout_p, float eps, bool center, "
    "ScalarType x_dtype, ScalarType? residual_dtype, ScalarType? bias_dtype, bool weight_grad, "
    "str backend, bool forced) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip
