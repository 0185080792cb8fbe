"""The public function of linear: describe the call, choose a backend, run it."""

from __future__ import annotations

import torch

from fastattn import backends, proving
from fastattn.ops.common.dispatch import Dispatch
from fastattn.ops.linear import problem as _problem
from fastattn.ops.linear import proof as _proof
from fastattn.ops.linear import registration

BACKENDS = registration.BACKENDS

_dispatch: Dispatch[_problem.LinearProblem] = Dispatch(BACKENDS, registration.run_kernel)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """A linear layer and an activation, out = activation(x weight^T + bias).

    In plain PyTorch, with F.gelu, F.relu or F.silu:

        out = activation(F.linear(x, weight, bias))

    The kernels add the bias and apply the activation while the product is in registers, and keep
    the sum before the activation for the backward; there the gradient is multiplied by the
    activation's derivative, and summed for the bias, in one pass. The products of the backward are
    ATen's, as is a call without an activation, which has nothing to fuse. Products accumulate in
    float32; float32 inputs are multiplied in float32. No kernel has atomics: the same inputs give
    the same bits.

    Args:
        x: (..., in_features), float16, bfloat16, float32 or float64. Any strides.
        weight: (out_features, in_features), any strides, never copied; a weight that lies the other
            way, as that of GPT-2's Conv1D, is given as `weight.t()`.
        bias: (out_features,), or None.
        activation: "gelu_tanh", "gelu" (by erf), "relu", "silu", or None.
        backend: "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        (..., out_features) in x's dtype; under autocast, in autocast's dtype, as F.linear.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    tensors = x, weight, bias
    key, plan = _dispatch.find(tensors, activation, backend)
    if plan is None:
        plan = _dispatch.make(key, _problem.describe(x, weight, bias, activation), backend)
    described, run = plan
    out: torch.Tensor = run(described, *tensors)
    return out


backends.register(linear, _problem.describe, BACKENDS)
proving.register("linear", _proof.PROOF)
