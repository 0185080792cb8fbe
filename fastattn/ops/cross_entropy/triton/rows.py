"""The loss of rows of logits, tile by tile: what the forward and backward kernels share.

    s = softcap tanh(logit_scale logits / softcap)
    loss = kept w_t (log T - (s_t - m)) + share sum_c w_c (log T - (s_c - m)) + z_loss (m + log T)^2

with m = max_c s_c and T = sum_c exp(s_c - m). A feature is written here once, for the kernels of
cross_entropy and of linear_cross_entropy. A feature that a call lacks is None in `Rule`, and no
code is compiled for it. Tiles are (rows, classes); a row of a tile, w, is (1, classes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.common.tanh import tanh


class Rule(NamedTuple):
    """The options of a loss."""

    logit_scale: Any
    softcap: Any
    kept: Any  # 1 - label_smoothing
    share: Any  # label_smoothing / classes
    z_loss: Any


@triton.jit
def scores(logits, rule):
    """(scores in float32, the derivative of the cap; of no meaning without one)."""
    s = logits.to(tl.float32)
    if rule.logit_scale is not None:
        s *= rule.logit_scale
    slope = s
    if rule.softcap is not None:
        saturation = tanh(s / rule.softcap)
        s = saturation * rule.softcap
        slope = 1.0 - saturation * saturation
    return s, slope


@triton.jit
def _base(m):
    """What is subtracted from scores whose maximum is m."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def add_tile(s, w, inside, m, total, smooth, seen, rule):
    """The state of rows (m, T, sum of w_c (s_c - m), sum of w_c) with a tile more.

    `s` is -inf outside; `w` is 1.0 without weights. The last two are only for label smoothing.
    """
    larger = tl.maximum(m, tl.max(s, 1))
    before, base = _base(m), _base(larger)
    total = total * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None]), 1)
    if rule.share is not None:
        weights = tl.where(inside, w, 0.0)
        terms = tl.where(inside, (s - base[:, None]) * w, 0.0)
        smooth += seen * (before - base) + tl.sum(terms, 1)
        seen += tl.sum(weights, 1)
    return larger, total, smooth, seen


@triton.jit
def join(m, total, smooth, seen, other_m, other_total, other_smooth, other_seen, rule):
    """The state of rows of which two parts have been gone through apart."""
    larger = tl.maximum(m, other_m)
    base = _base(larger)
    total = total * tl.exp(m - base) + other_total * tl.exp(other_m - base)
    if rule.share is not None:
        smooth += seen * (_base(m) - base)
        smooth += other_smooth + other_seen * (_base(other_m) - base)
        seen += other_seen
    return larger, total, smooth, seen


@triton.jit
def loss(picked, m, total, smooth, seen, w_t, rule):
    """The losses of rows whose target has the score `picked` and the weight `w_t`."""
    log_total = tl.log(total)
    losses = rule.kept * w_t * (log_total - (picked - m))
    if rule.share is not None:
        losses += rule.share * (seen * log_total - smooth)
    if rule.z_loss is not None:
        lse = m + log_total
        losses += rule.z_loss * lse * lse
    return losses


@triton.jit
def gradient(s, slope, is_target, w, m, total, dloss, w_t, all_weight, rule):
    """The gradient of a tile's logits; m, total, dloss and w_t are columns (rows, 1)."""
    scale = dloss
    if rule.logit_scale is not None:
        scale *= rule.logit_scale
    target = rule.kept * w_t
    every = target
    if rule.share is not None:
        every += rule.share * all_weight
    if rule.z_loss is not None:
        every += 2.0 * rule.z_loss * (m + tl.log(total))
    ds = tl.exp(s - m) * (every * scale / total) - tl.where(is_target, target * scale, 0.0)
    if rule.share is not None:
        ds -= rule.share * scale * w
    if rule.softcap is not None:
        ds *= slope
    return ds
