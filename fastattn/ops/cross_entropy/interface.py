"""The public function of cross_entropy: describe the call, choose a backend, run it."""

from __future__ import annotations

import torch

from fastattn import backends, proving
from fastattn.ops.common.dispatch import Dispatch
from fastattn.ops.cross_entropy import problem as _problem
from fastattn.ops.cross_entropy import proof as _proof
from fastattn.ops.cross_entropy import registration
from fastattn.ops.cross_entropy.problem import IGNORED

BACKENDS = registration.BACKENDS

_dispatch: Dispatch[_problem.LossProblem] = Dispatch(BACKENDS, registration.run_kernel)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """The cross-entropy of logits and target classes, in float32 whatever the logits are.

    In plain PyTorch, for logits (N, V) and targets (N,):

        s = logit_scale * logits.float()
        s = softcap * tanh(s / softcap)                  # if softcap is not 0
        loss = F.cross_entropy(s, targets, weight, ignore_index=ignore_index,
                               label_smoothing=label_smoothing, reduction="none")
        loss = loss + z_loss * s.logsumexp(-1) ** 2      # where targets != ignore_index
        mean = loss.sum() / weight[targets].sum()        # of the targets that count

    The scale comes before the cap; a model has one of them: Cohere multiplies its logits by
    `logit_scale`, Granite divides them by `logits_scaling`, Gemma 2 caps them. The z-loss keeps the
    softmax's denominator near 1 (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Kept for the backward are the logits themselves, with two numbers a row: do not modify them in
    place before it. The backward makes one tensor of their size, the gradient. No kernel has
    atomics: the same inputs give the same bits. A second derivative goes through the reference.

    Args:
        logits: (..., V), float16, bfloat16, float32 or float64; any strides.
        targets: (...), int64 or int32, classes from 0 to V - 1, or `ignore_index`.
        weight: (V,), a weight for each class, without a gradient; any of these dtypes. None for 1.
        ignore_index: a target that counts for nothing: its loss and gradient are 0.
        label_smoothing: from 0 to 1, the share that goes to all classes alike (Szegedy et al. 2015,
            arXiv:1512.00567).
        z_loss: the coefficient of lse^2, added for each target that counts, whatever its weight.
        logit_scale: factor of the logits.
        softcap: the scores' bound, 0 for none.
        reduction: "mean", "sum", or "none" for the losses themselves.
        backend: "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        A scalar, or (...) for "none", in float32, for float64 logits in float64, also under
        autocast. The mean is NaN if no target counts, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a target on a CPU is no class. On a GPU, where to look would wait, the kernels
            make the loss of such a row NaN.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    options = ignore_index, label_smoothing, z_loss, logit_scale, softcap, reduction
    key, plan = _dispatch.find((logits, targets, weight), *options, backend)
    if plan is None:
        named = dict(zip(_problem.Options._fields, options, strict=True))
        described = _problem.describe(logits, targets, weight=weight, **named)  # type: ignore[arg-type]
        plan = _dispatch.make(key, described, backend)
    described, run = plan
    loss: torch.Tensor = run(described, logits, targets, weight)
    return loss


backends.register(cross_entropy, _problem.describe, BACKENDS)
proving.register("cross_entropy", _proof.PROOF)
