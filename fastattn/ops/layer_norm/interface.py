"""The public functions of the norms: describe the call, choose a backend, run it."""

from __future__ import annotations

import torch

from fastattn import backends, proving
from fastattn.ops.common.dispatch import Dispatch
from fastattn.ops.layer_norm import problem as _problem
from fastattn.ops.layer_norm import proof as _proof
from fastattn.ops.layer_norm import registration, straight

BACKENDS = registration.BACKENDS

_dispatch: Dispatch[_problem.NormProblem] = Dispatch(BACKENDS, registration.run_kernel)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0,  # a float as default would have torch.compile trace twice
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimension, with dropout and a residual's addition fused.

        s = dropout(x) + residual
        out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    with the biased variance (Ba, Kiros and Hinton 2016, arXiv:1607.06450). The same as
    `torch.nn.functional.layer_norm(x + residual, x.shape[-1:], weight, bias, eps)`, after
    `torch.nn.functional.dropout(x, dropout_p)`, also under autocast. Statistics and sums are
    float32 (float64 for float64 inputs); the kernels merge partial statistics with Chan, Golub and
    LeVeque's formula (1983), so that a large mean does not cancel the variance. The weight
    gradients have no atomics: the same inputs give the same bits on the same GPU.

    Args:
        x: (..., hidden), at least one dimension; float16, bfloat16, float32 or float64. Any
            strides; the kernels read it without a copy where the last dimension is contiguous and
            the rows are evenly spaced.
        weight: (hidden,), None for 1; any of these dtypes, not necessarily x's.
        bias: (hidden,), None for 0; any of these dtypes.
        eps: added to the variance; finite, not negative.
        residual: x's shape; its dtype may be another. The sum has the promoted dtype of the two.
        dropout_p: probability with which an element of x is dropped before it is added to the
            residual, in [0, 1); the others are scaled by 1 / (1 - dropout_p). Not without a
            residual. Seeded by torch's generator of the device; only the seed is kept for the
            backward, except by "torch", whose dropout is PyTorch's own.
        backend: "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        out, (..., hidden), in x's dtype; with `residual` the pair (out, s), both in the dtype of s.
        Under autocast on an accelerator out is float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    return _normalise(x, weight, bias, eps, residual, dropout_p, backend, True)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0,  # a float as default would have torch.compile trace twice
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square normalisation over the last dimension, with dropout and a residual fused.

        s = dropout(x) + residual
        out = s / sqrt(mean(s^2) + eps) * weight

    (Zhang and Sennrich 2019, arXiv:1910.07467.) The same as
    `torch.nn.functional.rms_norm(x + residual, x.shape[-1:], weight, eps)`, also under autocast;
    dropout, precision and determinism as in `layer_norm`.

    Args:
        x: (..., hidden), at least one dimension; float16, bfloat16, float32 or float64. Any
            strides.
        weight: (hidden,), None for 1; any of these dtypes, not necessarily x's.
        eps: added to the mean square; finite, not negative. None is the machine epsilon of the
            dtype of the statistics, as in torch: float64's for float64 inputs, else float32's.
        residual: x's shape; its dtype may be another. The sum has the promoted dtype of the two.
        dropout_p: probability with which an element of x is dropped before it is added to the
            residual, in [0, 1); the others are scaled by 1 / (1 - dropout_p). Not without a
            residual. Seeded by torch's generator of the device; only the seed is kept for the
            backward, except by "torch", whose dropout is PyTorch's own.
        backend: "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        out, (..., hidden), in x's dtype; with `residual` the pair (out, s), both in the dtype of s.
        Under autocast on an accelerator out is float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    return _normalise(x, weight, None, eps, residual, dropout_p, backend, False)


def _normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    dropout_p: float,
    backend: str | None,
    center: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if residual is None and backend is None and not dropout_p:
        straight_out = straight.run(x, weight, bias, eps, center)
        if straight_out is not None:
            return straight_out
    key, plan = _dispatch.find((x, weight, bias, residual), eps, center, dropout_p, backend)
    if plan is None:
        described = _problem.describe(x, weight, bias, eps, residual, dropout_p, center=center)
        plan = _dispatch.make(key, described, backend)
    described, run = plan
    out, stream = run(described, x, weight, bias, residual)
    return out if residual is None else (out, stream)


backends.register(layer_norm, _problem.describe_layer_norm, BACKENDS)
backends.register(rms_norm, _problem.describe_rms_norm, BACKENDS)
for _op in ("layer_norm", "rms_norm"):
    proving.register(_op, _proof.PROOF)
