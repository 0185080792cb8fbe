"""The kernel backends' way in: `torch.ops.fastattn.layer_norm` and its backward.

One pair of ops is both norms: `center` tells layer_norm from rms_norm. Opaque to torch.compile,
with fake implementations for tracing and autograd formulas up to the second derivative. `backend`
names who runs the forward; if the user named it (`forced`), the backward stays on it too, else the
backward chooses anew.

What a call does not have is an empty tensor: `stream` without a residual (it is x), and gradients
that nobody asked for. `statistics` is rstd and, for layer_norm, mean: (2 or 1, ...) float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd
from fastattn.ops.layer_norm import reference
from fastattn.ops.layer_norm.problem import NormProblem, describe


def _load_cuda() -> ModuleType:
    from fastattn.ops.layer_norm import cuda

    return cuda


def _load_triton() -> ModuleType:
    from fastattn.ops.layer_norm import triton

    return triton


KERNELS = (
    backends.Backend("cuda", _load_cuda),
    backends.Backend("triton", _load_triton),
)

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center, "
    "ScalarType out_dtype, str backend, bool forced) "
    "-> (Tensor out, Tensor stream, Tensor statistics)"
)
_library.define(
    "layer_norm_backward(Tensor dout, Tensor? dstream, Tensor stream, Tensor? weight, "
    "Tensor statistics, float eps, bool center, ScalarType x_dtype, ScalarType? residual_dtype, "
    "ScalarType? bias_dtype, bool weight_grad, str backend, bool forced) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def entry(backend: backends.Backend, problem: NormProblem, forced: bool) -> Callable[..., Any]:
    """What runs a call on `backend`: f(problem, x, weight, bias, residual) -> (out, stream)."""
    if backend.name == "torch":
        return backend.module.entry(problem)
    if backend.name == "reference":
        return backend.module.normalise
    return functools.partial(_through_registered_op, backend.name, forced)


def _through_registered_op(
    backend: str,
    forced: bool,
    problem: NormProblem,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, stream, _ = torch.ops.fastattn.layer_norm(
        x, residual, weight, bias, problem.eps, problem.center, problem.out_dtype, backend, forced
    )
    return out, stream


@functools.cache
def _kernel(name: str) -> Any:
    return next(b for b in KERNELS if b.name == name).module


# --- forward ------------------------------------------------------------------------------------


def _forward(x, residual, weight, bias, eps, center, out_dtype, backend, forced):  # type: ignore[no-untyped-def]
    return _kernel(backend).forward(x, residual, weight, bias, eps, center, out_dtype)


def _forward_fake(x, residual, weight, bias, eps, center, out_dtype, backend, forced):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape, dtype=out_dtype)
    stream = out.new_empty(0)
    if residual is not None:
        stream = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    shape = (2 if center else 1, *x.shape[:-1])
    return out, stream, x.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.center, _, ctx.backend, ctx.forced = inputs
    _, stream, statistics = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else stream, weight, statistics)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any,
    dout: torch.Tensor | None,
    dstream: torch.Tensor | None,
    dstatistics: None,
) -> tuple[Any, ...]:
    stream, weight, statistics = ctx.saved_tensors
    if ctx.residual_dtype is None:
        dstream = None  # x has no second way out; the op's `stream` was empty
    rest = (None,) * 5
    if dout is None:
        if dstream is None:
            return (None,) * 9
        return dstream.to(ctx.x_dtype), dstream.to(ctx.residual_dtype), None, None, *rest
    _, residual_grad, weight_grad, bias_grad = ctx.needs_input_grad[:4]
    dx, dresidual, dweight, dbias = torch.ops.fastattn.layer_norm_backward(
        dout, dstream, stream, weight, statistics, ctx.eps, ctx.center, ctx.x_dtype,
        ctx.residual_dtype, ctx.bias_dtype if bias_grad else None, weight_grad,
        ctx.backend, ctx.forced,
    )  # fmt: skip
    if ctx.residual_dtype == ctx.x_dtype:
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
    dout, dstream, stream, weight, statistics, eps, center, x_dtype, residual_dtype, bias_dtype,
    weight_grad, backend, forced,
):  # fmt: skip
    problem = describe(stream, weight, None, eps, None, center=center)
    kernel = backends.select_backward(problem.op, KERNELS, problem, backend, forced)
    return kernel.backward(
        dout, dstream, stream, weight, statistics, center, x_dtype, residual_dtype, bias_dtype,
        weight_grad,
    )  # fmt: skip


def _backward_fake(  # type: ignore[no-untyped-def]
    dout, dstream, stream, weight, statistics, eps, center, x_dtype, residual_dtype, bias_dtype,
    weight_grad, backend, forced,
):  # fmt: skip
    has_dresidual = residual_dtype is not None and residual_dtype != x_dtype
    dx = stream.new_empty(stream.shape, dtype=x_dtype)
    dresidual = dx.new_empty(stream.shape if has_dresidual else 0, dtype=residual_dtype)
    dweight = dx.new_empty(0) if not weight_grad else weight.new_empty(weight.shape)
    dbias = dx.new_empty(0 if bias_dtype is None else stream.shape[-1], dtype=bias_dtype)
    return dx, dresidual, dweight, dbias


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, dstream, stream, weight, _, ctx.eps, ctx.center, *ctx.gradients, _, _ = inputs
    ctx.save_for_backward(dout, dstream, stream, weight)
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    """The second derivative, by differentiating the reference twice.

    `statistics` is a function of the stream, through which the whole derivative is taken.
    """
    x_dtype, residual_dtype, bias_dtype, weight_grad = ctx.gradients
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        dout, dstream, stream, weight = leaves
        assert dout is not None and stream is not None
        bias = None
        if bias_dtype is not None:
            bias = stream.new_zeros(stream.shape[-1], dtype=bias_dtype, requires_grad=True)
        problem = describe(stream, weight, bias, ctx.eps, None, center=ctx.center)
        problem = dataclasses.replace(problem, out_dtype=dout.dtype)
        out, _ = reference.normalise(problem, stream, weight, bias, None)
        inputs = [x for x in (stream, weight if weight_grad else None, bias) if x is not None]
        first = iter(torch.autograd.grad(out, inputs, dout, create_graph=True))
        ds = next(first)
        if dstream is not None:
            ds = ds + dstream
        outputs = (
            ds.to(x_dtype),
            None if residual_dtype in (None, x_dtype) else ds.to(residual_dtype),
            next(first) if weight_grad else None,
            None if bias is None else next(first),
        )
        pairs = [
            (y, dy)
            for y, dy in zip(outputs, grads, strict=True)
            if y is not None and dy is not None
        ]
        reached, directions = zip(*pairs, strict=True)
        wanted = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad(reached, wanted, directions, allow_unused=True))
    return *(None if x is None else next(second) for x in leaves), *(None,) * 9


torch.library.register_fake("fastattn::layer_norm", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::layer_norm_backward", _backward_fake, lib=_library)
autograd.register(_library, "layer_norm", _forward, _setup_context, _autograd)
autograd.register(
    _library, "layer_norm_backward", _backward, _backward_setup_context, _double_backward
)
