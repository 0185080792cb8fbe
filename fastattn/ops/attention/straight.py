"""A plain attention on a CPU goes straight to ATen (ops/common/plain.py)."""

from __future__ import annotations

import math

from torch import Tensor

from fastattn.ops.attention.sdpa import SMALLEST, sdpa
from fastattn.ops.common import modes
from fastattn.ops.common.plain import ERRORS, plain


def run(
    q: Tensor, k: Tensor, v: Tensor, causal: object, softmax_scale: float | None
) -> Tensor | None:
    """The result of a call without other features, or None."""
    try:
        if not (plain(q, k, v) and modes.plain()):
            return None
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return _attend(q, k, v, causal, softmax_scale)
    except ERRORS:
        return None


def heads_first(
    q: Tensor, k: Tensor, v: Tensor, causal: object, softmax_scale: float | None
) -> Tensor | None:
    """`run` for (batch, heads, seqlen, head_dim), as ATen has it; the result is as `run`'s."""
    try:
        if not (plain(q, k, v) and modes.plain()):
            return None
        return _attend(q, k, v, causal, softmax_scale)
    except ERRORS:
        return None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: object, softmax_scale: float | None
) -> Tensor | None:
    if softmax_scale is not None and not (
        type(softmax_scale) is float and SMALLEST <= softmax_scale < math.inf
    ):
        return None
    shape, kv_shape = q.shape, k.shape
    batch, heads, seqlen_q, head_dim = shape
    kv_batch, kv_heads, seqlen_k, kv_head_dim = kv_shape
    fits = batch == kv_batch and head_dim == kv_head_dim and heads % kv_heads == 0
    if not fits or kv_shape != v.shape or 0 in shape or seqlen_k == 0:
        return None
    is_causal = causal is True and seqlen_q > 1
    if (is_causal and seqlen_q != seqlen_k) or not isinstance(causal, bool):
        return None
    out = sdpa(q, k, v, None, 0.0, is_causal, softmax_scale, heads != kv_heads)
    return out.transpose(1, 2)
