"""F.scaled_dot_product_attention, in float32 where a CPU is slow in 16 bits.

A CPU without an instruction for it multiplies float16 one element at a time, and ATen's backward in
bfloat16 works on blocks of 32 queries where there are few: computed in float32, with the casts, the
same call takes 1/2 to 1/10 of the time. The result is rounded once, so it is the more precise one.
Memory: float32 copies of what ATen reads and keeps, twice the bytes, at any length.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import measured
from fastattn.ops.common import modes

# Bound once: `fastattn.override_sdpa` may put our own function in its place.
SDPA = F.scaled_dot_product_attention

# The smallest factor of scores that ATen's kernels, in float32, do not take for zero.
SMALLEST = torch.finfo(torch.float32).tiny

HALVES = (torch.float16, torch.bfloat16)

# measured.py's rows of this CPU: (dtype, whether gradients are wanted) -> where it is faster.
FASTER = {
    (dtype, needs_grad): row
    for (dtype, needs_grad, vectors), row in measured.IN_FLOAT32.items()
    if vectors == torch.backends.cpu.get_cpu_capability() and not torch.cpu._is_amx_tile_supported()
}


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """(batch, heads, seqlen, head_dim), as F.scaled_dot_product_attention's arguments."""
    if q.dtype not in HALVES or not in_float32(q, k, v):
        return SDPA(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    if attn_mask is not None and attn_mask.dtype is q.dtype:
        attn_mask = attn_mask.float()
    # Autocast would cast them back.
    on = modes.autocast_enabled("cpu")
    with torch.autocast("cpu", enabled=False) if on else contextlib.nullcontext():
        out = SDPA(
            q.float(), k.float(), v.float(), attn_mask, dropout_p, is_causal, scale=scale,
            enable_gqa=grouped,
        )  # fmt: skip
    return out.to(q.dtype)


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these, of 16 bits, are attended to faster in float32.

    In a recording no size is asked, for the graph would be tied to it: there a row counts if it has
    no upper limit.
    """
    if not q.is_cpu:
        return False
    row = FASTER.get((q.dtype, modes.needs_grad(q, k, v)))
    if row is None:
        return False
    if modes.recorded():
        return row.most is None
    return measured.slower(row, "cpu", q.shape[2] * k.shape[2] * q.shape[3]) is None
