"""The public function of ffn: describe the call, choose a backend, run it."""

from __future__ import annotations

import torch

from fastattn import backends, proving
from fastattn.ops.common import descriptors
from fastattn.ops.common.dispatch import Dispatch
from fastattn.ops.ffn import problem as _problem
from fastattn.ops.ffn import proof as _proof
from fastattn.ops.ffn import registration

BACKENDS = registration.BACKENDS

_dispatch: Dispatch[_problem.FFNProblem] = Dispatch(BACKENDS, registration.run_kernel)


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str = "gelu_tanh",
    *,
    gate: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    layout: str = "linear",
    recompute: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The feed-forward part of a transformer, out = activation(x w1 + b1) w2 + b2.

    In plain PyTorch, for layout="linear":

        hidden = activation(F.linear(x, w1, b1))
        out = F.linear(hidden, w2, b2)

    With a gate, the hidden layer is a product of two (Shazeer 2020, arXiv:2002.05202): SwiGLU with
    "silu", GeGLU with "gelu" or "gelu_tanh", ReGLU with "relu".

        hidden = activation(F.linear(x, gate, gate_bias)) * F.linear(x, w1, b1)
        out = F.linear(hidden, w2, b2)

    The kernels add the bias and apply the activation to the first product while it is in registers,
    with a gate to both first products; in the backward they multiply by the activation's derivative
    there, and form the hidden layer again instead of keeping it. The remaining products are plain
    ones: `gluon` and `cuda` compute them too, `triton` leaves them to ATen. Products accumulate in
    float32; float32 inputs are multiplied in float32. No kernel has atomics: the same inputs give
    the same bits.

    Args:
        x: (..., in_features), float16, bfloat16, float32 or float64.
        w1: the first weight, any strides, never copied: (hidden, in_features) in layout "linear",
            (in_features, hidden) in layout "conv1d".
        b1: (hidden,), or None for no bias.
        w2: the second weight: (out_features, hidden), or (hidden, out_features) in "conv1d".
        b2: (out_features,), or None.
        gate: the weight of the gate, of w1's shape, any strides, never copied, or None for no gate.
            The two halves of one joint weight are `gate, w1 = joint.chunk(2)`.
        gate_bias: (hidden,), or None.
        activation: "gelu_tanh" (GPT-2's gelu_new), "gelu" (by erf), "relu" or "silu".
        layout: "linear", weights as torch.nn.Linear has them, or "conv1d", as GPT-2's Conv1D.
        recompute: keep only x for the backward and compute the rest again; else the kernels keep
            x w1 + b1 too, and x gate + gate_bias, and the torch backend what autograd keeps. No
            effect without gradients, and under torch.func transforms.
        backend: "gluon", "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        (..., out_features) in x's dtype; under autocast, in autocast's dtype, as F.linear.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    tensors = x, w1, b1, w2, b2, gate, gate_bias
    key, plan = _dispatch.find(tensors, activation, layout, recompute, backend)
    if plan is None:
        described = _problem.describe(
            x, w1, b1, w2, b2, activation, gate=gate, gate_bias=gate_bias, layout=layout,
            recompute=recompute,
        )  # fmt: skip
        plan = _dispatch.make(key, described, backend)
    described, run = plan
    out: torch.Tensor = run(described, *tensors)
    return out


backends.register(ffn, _problem.describe, BACKENDS, descriptors.copies("x", "w1", "w2", "gate"))
proving.register("ffn", _proof.PROOF)
