"""Attention backward, without atomics: each output is written by one program.

With s the scores of scores.py, p = exp(s - lse) recomputed tile by tile, and D the dropout (0 or
1 / (1 - dropout_p) at each weight),

    delta = rowsum(dO * out) - dlse                     (here; or rowsum(p * D dO v^T))
    dV = (D p)^T dO,   dS = p * (D dO v^T - delta)
    dbias = dS,        dsink = -sum exp(sink - lse) delta
    dX = dS * (1 - tanh^2)                              (through the softcap)
    dK = softmax_scale dX^T q                           (keys.py: by key tile, over its queries)
    dQ = softmax_scale dX k                             (queries.py: by query tile, over its keys)

(Dao 2023, arXiv:2307.08691, with the gradient of the LSE: dlse/ds = p.) Recomputing p in both loops
costs seven products instead of the five of one loop with atomics, and buys equal bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import (
    Extras,
    Learnt,
    Settings,
    backward_results,
    learnt_results,
)
from fastattn.ops.attention.triton import keys, launching, queries
from fastattn.ops.attention.triton.bias import bias_gradient
from fastattn.ops.attention.triton.documents import TileRanges
from fastattn.ops.attention.triton.memory import Rows, load_rows, strip
from fastattn.ops.common import launch
from fastattn.ops.common.plans import PlanCache

DELTA_ROWS = 32


@triton.jit(do_not_specialize=launching.SIZES)
def _delta_kernel(
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v)
    out_ptr,
    dlse_ptr,  # (batch, heads, seqlen_q), contiguous, or None
    delta_ptr,  # (batch, heads, seqlen_q), contiguous
    stride_db, stride_ds, stride_dh,  # in units of ALIGN elements
    stride_ob, stride_os, stride_oh,
    heads,
    seqlen_q,
    tiles_m,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) % tiles_m * BLOCK_M
    batch_head = tl.program_id(0) // tiles_m
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    inside = rows < seqlen_q - first_row
    first = first_row.to(tl.int64)
    of_dout = strip(Rows(dout_ptr, stride_db, stride_ds, stride_dh), batch, head, first, ALIGN)
    of_out = strip(Rows(out_ptr, stride_ob, stride_os, stride_oh), batch, head, first, ALIGN)
    dout = load_rows(of_dout, 0, rows, inside, HEAD_DIM, BLOCK_D)
    out = load_rows(of_out, 0, rows, inside, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    line = batch_head.to(tl.int64) * seqlen_q + first_row + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + line, mask=inside, other=0.0)
    tl.store(delta_ptr + line, delta, mask=inside)


class _Plan(NamedTuple):
    """The launches of calls with the same metadata."""

    x: launching.Layout  # its strides are those of q, k, v, dout and out
    copies: bool  # whether the kernels need copies of inputs
    delta: launch.Prepared
    row_sums: launch.Prepared
    keys: launch.Prepared
    queries: launch.Prepared
    of_queries: TileRanges | None
    of_keys: TileRanges | None


_plans: PlanCache[_Plan] = PlanCache()


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Learnt,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, *learnt_results), each shaped as its input and contiguous."""
    dq, dk, dv = backward_results(q, k, v, extras, settings)
    lse = lse.contiguous()
    key = launching.key(q, k, v, extras, settings, dout, out, dlse)
    plan = _plans.get(key)
    if plan is None or plan.copies:
        (q, k, v, dout, out), extras, copies = launching.prepared(extras, q, k, v, dout, out)
        if plan is None:
            plan = _plan(dout, out, q, k, v, extras, settings, copies)
            _plans.put(key, plan)
    x = plan.x
    of_queries = None if plan.of_queries is None else plan.of_queries(extras)
    of_keys = None if plan.of_keys is None else plan.of_keys(extras)
    by_queries = (of_queries, *launching.pointers(extras, transposed=False))
    by_keys = (of_keys, *launching.pointers(extras, transposed=True))

    delta = torch.empty_like(lse)
    if wanted.bias and x.element_size < 4:
        # dS summed over many rows shows what rounding of `out` does to its row sum: compute it.
        plan.row_sums(q, k, v, dout, lse, delta, delta, *by_queries)
        delta = delta if dlse is None else delta - dlse
    else:
        plan.delta(dout, out, None if dlse is None else dlse.contiguous(), delta)
    plan.keys(q, k, v, dout, lse, delta, dk, dv, *by_keys)
    plan.queries(q, k, v, dout, lse, delta, dq, *by_queries)
    dbias = None
    if wanted.bias:
        dbias = bias_gradient(x, q, k, v, dout, lse, delta, extras, settings)
    return dq, dk, dv, *learnt_results(q, wanted, extras, lse, delta, dbias)


def _plan(
    dout: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
    copies: bool,
) -> _Plan:
    x = launching.layout(q, k, v, extras, settings, dout, out)
    # One sequence of all packed tokens is enough for sums over rows.
    batch = 1 if x.packed else x.batch
    tiles_delta = triton.cdiv(x.seqlen_q, DELTA_ROWS)
    delta = launch.Prepared(
        _delta_kernel,
        (tiles_delta * x.heads * batch,),
        (*x.strides[9:], x.heads, x.seqlen_q, tiles_delta),
        HEAD_DIM=x.head_dim_v,
        BLOCK_D=tiles.block_d(x.head_dim_v),
        BLOCK_M=DELTA_ROWS,
        ALIGN=x.align,
        num_warps=4,
        num_stages=1,
    )
    by_keys, *tiles_of_keys = keys.prepared(x, extras, settings)
    row_sums, *_ = queries.prepared(x, extras, settings, row_sums=True)
    by_queries, *tiles_of_queries = queries.prepared(x, extras, settings, row_sums=False)
    of_queries = of_keys = None
    if extras.q_documents is not None:
        of_queries = TileRanges(x, *tiles_of_queries, of_queries=True)
        of_keys = TileRanges(x, *tiles_of_keys, of_queries=False)
    return _Plan(x, copies, delta, row_sums, by_keys, by_queries, of_queries, of_keys)
