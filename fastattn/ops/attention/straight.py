"""A plain call on a CPU goes straight to ATen, without being described.

To look up a plan takes 3 to 4 us, as long as ATen takes for a few rows. But most calls on a CPU are
plain: of them it is known beforehand that the backend is `torch`, and what it does.

The answer None means "describe it": for all calls that are out of the ordinary, and where ATen
raises one of `ERRORS`, so that the errors of a caller are those of problem.py. What ATen would take
and the op refuses, this has to see itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.attention.aten import SDPA, SMALLEST
from fastattn.ops.common import modes

TYPES = frozenset((Tensor, torch.nn.Parameter))
# Not float64, where the op prefers the reference.
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_NOBODY = None, None


def run(
    q: Tensor, k: Tensor, v: Tensor, causal: object, softmax_scale: float | None
) -> Tensor | None:
    """The result of a call without other features, or None."""
    try:
        if not (plain(q, k, v) and modes.plain()):
            return None
        if softmax_scale is not None and not (
            type(softmax_scale) is float and SMALLEST <= softmax_scale < math.inf
        ):
            return None
        shape, kv_shape = q.shape, k.shape
        batch, seqlen_q, heads, head_dim = shape
        kv_batch, seqlen_k, kv_heads, kv_head_dim = kv_shape
        fits = batch == kv_batch and head_dim == kv_head_dim and heads % kv_heads == 0
        if not fits or kv_shape != v.shape or 0 in shape or seqlen_k == 0:
            return None
        is_causal = causal is True and seqlen_q > 1
        if (is_causal and seqlen_q != seqlen_k) or not isinstance(causal, bool):
            return None
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = heads != kv_heads
        out = SDPA(q, k, v, None, 0.0, is_causal, scale=softmax_scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    except ERRORS:
        return None


def plain(x: Tensor, *others: Tensor) -> bool:
    """Whether these are tensors of one dtype on the CPU, for which nobody chooses a backend.

    Who might: `use_backend` and the environment. torch.compile has no use for the short way.
    """
    if torch.compiler.is_compiling() or type(x) not in TYPES:
        return False
    dtype = x.dtype
    if dtype not in DTYPES or not x.is_cpu or backends.state() != _NOBODY:
        return False
    return all(other.dtype is dtype and other.is_cpu for other in others)
