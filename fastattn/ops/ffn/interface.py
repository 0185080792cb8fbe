"""The public function of ffn: describe the call, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import modes, slower
from fastattn.ops.common.plans import PlanCache
from fastattn.ops.ffn import aten, reference, registration
from fastattn.ops.ffn import problem as _problem

BACKENDS = slower.consulted(
    (
        *registration.KERNELS,
        backends.Backend("torch", lambda: aten),
        backends.Backend("reference", lambda: reference),
    )
)

_plans: PlanCache[tuple[_problem.FFNProblem, Callable[..., Any]]] = PlanCache()


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str = "gelu_tanh",
    *,
    layout: str = "linear",
    recompute: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The feed-forward part of a transformer, out = activation(x w1 + b1) w2 + b2.

    In plain PyTorch, for layout="linear":

        hidden = activation(F.linear(x, w1, b1))
        out = F.linear(hidden, w2, b2)

    The kernels add the bias and apply the activation to the first product while it is in registers;
    in the backward they multiply by the activation's derivative there, and form the hidden layer
    again instead of keeping it. The remaining products are plain ones and go to ATen. Products
    accumulate in float32; float32 inputs are multiplied in float32. No kernel has atomics: the same
    inputs give the same bits.

    Args:
        x: (..., in_features), float16, bfloat16, float32 or float64.
        w1: the first weight, any strides, never copied: (hidden, in_features) in layout "linear",
            (in_features, hidden) in layout "conv1d".
        b1: (hidden,), or None for no bias.
        w2: the second weight: (out_features, hidden), or (hidden, out_features) in "conv1d".
        b2: (out_features,), or None.
        activation: "gelu_tanh" (GPT-2's gelu_new), "gelu" (by erf), "relu" or "silu".
        layout: "linear", weights as torch.nn.Linear has them, or "conv1d", as GPT-2's Conv1D.
        recompute: keep x alone for the backward and compute the rest again; else the kernels keep
            x w1 + b1 too, and the torch backend what autograd keeps. No effect without gradients,
            and under torch.func transforms.
        backend: "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        (..., out_features) in x's dtype; under autocast, in autocast's dtype, as F.linear.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    if backend is None and recompute is False:
        out = aten.straight(x, w1, b1, w2, b2, activation, layout)
        if out is not None:
            return out
    try:
        if modes.recorded():
            key, plan = None, None
        else:
            device = x.device
            key = (
                x.shape, x.dtype, device, x.requires_grad,
                w1.shape, w1.dtype, w1.device, w1.requires_grad,
                b1 if b1 is None else (b1.shape, b1.dtype, b1.device, b1.requires_grad),
                w2.shape, w2.dtype, w2.device, w2.requires_grad,
                b2 if b2 is None else (b2.shape, b2.dtype, b2.device, b2.requires_grad),
                activation, layout, recompute, backend, backends.state(),
                torch.is_grad_enabled(), modes.transformed(), modes.autocast_dtype(device.type),
            )  # fmt: skip
            plan = _plans.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, nested, or of symbolic size
        key, plan = None, None
    if plan is None:
        described = _problem.describe(
            x, w1, b1, w2, b2, activation, layout=layout, recompute=recompute
        )
        chosen = backends.select("ffn", BACKENDS, described, backend)
        plan = described, registration.entry(chosen, forced=backends.named(backend) is not None)
        if key is not None:
            _plans.put(key, plan)
    described, run = plan
    return run(described, x, w1, b1, w2, b2)


backends.register(ffn, _problem.describe, BACKENDS)
