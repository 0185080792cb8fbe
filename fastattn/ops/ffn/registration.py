"""The kernel backends' way in: `torch.ops.fastattn.ffn` and its backward (common/layers.py).

Opaque to torch.compile, with fake implementations for tracing. pre = x w1 + b1, of shape (tokens,
hidden); with a gate (2, tokens, hidden), x gate + gate_bias after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import flops, layers, recovery
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


def _formula(tensors: tuple[Any, ...], activation: str, layout: str) -> torch.Tensor:
    return reference.forward(_problem(tensors, activation, layout), *tensors)


def _problem(tensors: tuple[Any, ...], activation: str, layout: str) -> FFNProblem:
    x, w1, b1, w2, b2, gate, gate_bias = tensors
    gates = {"gate": gate, "gate_bias": gate_bias}
    return describe(x, w1, b1, w2, b2, activation, layout=layout, **gates)


layers.register(
    "ffn",
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate, Tensor? gate_bias",
    "str activation, str layout",
    _forward, _forward_fake, _backward, _formula,
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
