"""The definition of cross_entropy: plain differentiable PyTorch, read as the formula.

    s = softcap tanh(logit_scale logits / softcap)              (without softcap: the scaled logits)
    lse = log sum_c exp(s_c),   log p = s - lse
    loss = -(1 - label_smoothing) w_t log p_t
           - label_smoothing / V  sum_c w_c log p_c
           + z_loss lse^2                                       for a target t that counts, else 0

    mean = sum of the losses / sum of w_t over the targets that count

with w = 1 if no weight is given. Computed in float32, for float64 logits in float64.
"""

from __future__ import annotations

import torch

from fastattn.ops.common import modes
from fastattn.ops.cross_entropy.problem import LossProblem, Options, check_classes


def forward(
    problem: LossProblem,
    logits: torch.Tensor,  # (..., V)
    targets: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,)
) -> torch.Tensor:
    check_classes(targets, problem.options.ignore_index, logits.shape[-1])
    losses = token_losses(logits, targets, weight, problem.options)
    return reduce(losses, targets, weight, problem.options)


def token_losses(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """The losses (...) before any reduction."""
    s = scores(logits, options)
    counts = targets != options.ignore_index
    classes = targets.masked_fill(~counts, 0).long()
    log_p = s.log_softmax(-1)
    nll = -log_p.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    if weight is not None:
        weight = weight.to(s.dtype)
        nll = nll * weight[classes]
    losses = nll
    if options.label_smoothing:
        weighted = log_p if weight is None else log_p * weight
        smoothing = options.label_smoothing
        losses = (1.0 - smoothing) * nll - smoothing * weighted.mean(-1)
    if options.z_loss:
        losses = losses + options.z_loss * s.logsumexp(-1).square()
    return losses.masked_fill(~counts, 0.0)


def scores(logits: torch.Tensor, options: Options) -> torch.Tensor:
    """The logits in float32 (float64), scaled, then capped."""
    dtype = modes.at_least_float32(logits.dtype)
    s = logits if logits.dtype == dtype else logits.to(dtype)  # `to` itself takes 2 us to see that
    if options.logit_scale != 1.0:
        s = s * options.logit_scale
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    return s


def reduce(
    losses: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """The result of a call from the losses (...), or from their sum, a scalar."""
    if options.reduction == "none":
        return losses
    total = losses.sum()
    if options.reduction == "sum":
        return total
    counts = targets != options.ignore_index
    if weight is None:
        divisor = counts.sum().to(losses.dtype)
    else:
        of_targets = weight.to(losses.dtype)[targets.masked_fill(~counts, 0).long()]
        divisor = of_targets.masked_fill(~counts, 0.0).sum()
    # NaN where nothing counts, as 0 / 0 is, but with gradients of 0.
    nothing = divisor == 0
    return (total / divisor.masked_fill(nothing, 1.0)).masked_fill(nothing, torch.nan)
