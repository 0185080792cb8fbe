"""The public function of linear_cross_entropy: describe the call, choose a backend, run it."""

from __future__ import annotations

import torch

from fastattn import backends, proving
from fastattn.ops.common import descriptors
from fastattn.ops.common.dispatch import Dispatch
from fastattn.ops.cross_entropy.problem import IGNORED, Options
from fastattn.ops.linear_cross_entropy import problem as _problem
from fastattn.ops.linear_cross_entropy import proof as _proof
from fastattn.ops.linear_cross_entropy import registration, straight

BACKENDS = registration.BACKENDS

NO_OPTION = (None, None, 0.0, 0.0, 1.0, 0.0)

_dispatch: Dispatch[_problem.LinearLossProblem] = Dispatch(BACKENDS, registration.run_kernel)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """The cross-entropy of a language model's head, whose logits are never there as a whole.

    In plain PyTorch:

        cross_entropy(F.linear(x, weight, bias), targets, weight=class_weight, ...)

    with the options, the order of scale and cap, and the precision of `fastattn.cross_entropy`
    (Wijmans et al. 2024, arXiv:2411.09009, is the idea). For 8192 tokens and 128 Ki classes in
    float32 the logits would take 4 GB, and their gradients the same again.

    A GPU's kernels make tiles of logits and keep two numbers a row; the backward makes the tiles
    again. On a CPU chunks of rows take one buffer, forward and backward together, and rows that do
    not count cost nothing. The gradient of the weight is one buffer that adds up in float32; with
    reduction "mean" or "sum" a CPU's forward makes it, and the backward hands this buffer to
    autograd, so a gradient of the same weight as an embedding is added to it in place. Nothing has
    atomics: the same inputs give the same bits. Calls of few logits on a CPU, second derivatives
    and torch.func transforms make the logits.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64; any strides.
        weight: (V, D), of x's dtype; under autocast of any but float64.
        targets: (...), int64 or int32, classes from 0 to V - 1, or `ignore_index`.
        bias: (V,), of x's dtype, or None.
        class_weight: (V,), a weight for each class, without a gradient; any of these dtypes.
        ignore_index, label_smoothing, z_loss, logit_scale, softcap, reduction: as `cross_entropy`
            has them.
        backend: "gluon", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        A scalar, or (...) for "none", in float32, for float64 inputs in float64. Under autocast the
        products are in autocast's dtype, as F.linear's. The mean is NaN if no target counts, with
        gradients of 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a target on a CPU is no class; on a GPU the loss of such a row is NaN.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    others = class_weight, backend, label_smoothing, z_loss, logit_scale, softcap
    if others == NO_OPTION:
        out = straight.run(x, weight, targets, bias, ignore_index, reduction)
        if out is not None:
            return out
    tensors = x, weight, targets, bias, class_weight
    options = ignore_index, label_smoothing, z_loss, logit_scale, softcap, reduction
    key, plan = _dispatch.find(tensors, *options, backend)
    if plan is None:
        named = dict(zip(Options._fields, options, strict=True))
        described = _problem.describe(
            x,
            weight,
            targets,
            bias,
            class_weight=class_weight,
            **named,  # type: ignore[arg-type]
        )
        plan = _dispatch.make(key, described, backend)
    described, run = plan
    loss: torch.Tensor = run(described, *tensors)
    return loss


backends.register(
    linear_cross_entropy, _problem.describe, BACKENDS, descriptors.copies("x", "weight")
)
proving.register("linear_cross_entropy", _proof.PROOF)
