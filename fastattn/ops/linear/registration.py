"""The kernel backends' way in: `torch.ops.fastattn.linear` and its backward (common/layers.py).

Opaque to torch.compile, with fake implementations for tracing. pre = x weight^T + bias, of shape
(tokens, out_features).
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import flops, layers
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


def _forward(x, weight, bias, activation, save_pre, backend, forced):  # type: ignore[no-untyped-def]
    kernel = backends.module_of(BACKENDS, backend)
    return kernel.forward(x, weight, bias, activation, save_pre)


def _forward_fake(x, weight, bias, activation, save_pre, backend, forced):  # type: ignore[no-untyped-def]
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    pre = x.new_empty((tokens, weight.shape[0]) if save_pre else (0,))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), pre


def _backward(dout, x, weight, bias, pre, needs, activation, backend, forced):  # type: ignore[no-untyped-def]
    problem = describe(x, weight, bias, activation)
    kernel = backends.select_backward("linear", BACKENDS, problem, backend, forced)
    return kernel.backward(dout, x, weight, bias, pre, needs, activation)


def _formula(tensors: tuple[Any, ...], activation: str) -> torch.Tensor:
    x, weight, bias = tensors
    return reference.forward(describe(x, weight, bias, activation), x, weight, bias)


layers.register(
    "linear", "Tensor x, Tensor weight, Tensor? bias", "str activation",
    _forward, _forward_fake, _backward, _formula,
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
