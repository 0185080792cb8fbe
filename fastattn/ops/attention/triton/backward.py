"""Attention backward, without atomics: three kernels, each output written by one program.

With p = exp(softmax_scale q k^T - lse) recomputed tile by tile,

    delta = rowsum(dO * out) - dlse                     (preprocess)
    dV = p^T dO,   dS = p * (dO v^T - delta)
    dK = softmax_scale dS^T q                           (by key tile, over its queries)
    dQ = softmax_scale dS k                             (by query tile, over its keys)

(Dao 2023, arXiv:2307.08691, with the gradient of the LSE: dlse/ds = p.) Recomputing p in both loops
costs seven products instead of the five of one loop with atomics, and buys equal bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import tiles
from fastattn.ops.attention.triton.forward import LOG2_E, mask_bytes, mask_strides, readable
from fastattn.ops.attention.triton.scores import hide, load_tile, store_tile
from fastattn.ops.common import launch

LOG2_E_CONSTANT = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _delta_kernel(
    dout_ptr,  # (batch, seqlen_q, heads, head_dim)
    out_ptr,
    dlse_ptr,  # (batch, heads, seqlen_q), contiguous
    delta_ptr,  # (batch, heads, seqlen_q), contiguous
    stride_db, stride_ds, stride_dh,
    stride_ob, stride_os, stride_oh,
    heads,
    seqlen_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    first_row = tl.program_id(0) % tiles_m * BLOCK_M
    batch_head = tl.program_id(0) // tiles_m
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    limit = seqlen_q - first_row
    dout_base = dout_ptr + batch * stride_db + head * stride_dh + first_row.to(tl.int64) * stride_ds
    out_base = out_ptr + batch * stride_ob + head * stride_oh + first_row.to(tl.int64) * stride_os
    dout = load_tile(dout_base, rows, stride_ds, limit, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    out = load_tile(out_base, rows, stride_os, limit, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    line = batch_head.to(tl.int64) * seqlen_q + first_row + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + line, mask=rows < limit, other=0.0)
    tl.store(delta_ptr + line, delta, mask=rows < limit)


@triton.jit
def _row_state(lse_ptr, delta_ptr, line, rows, rows_left):
    """(lse in base 2, delta) of a tile's rows; those past the end or without a key get p = 0."""
    inside = rows < rows_left
    lse = tl.load(lse_ptr + line + rows, mask=inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E_CONSTANT
    return lse, tl.load(delta_ptr + line + rows, mask=inside, other=0.0)


@triton.jit
def _accumulate_keys(
    dk,  # (BLOCK_N, BLOCK_D)
    dv,
    k,  # (BLOCK_N, BLOCK_D)
    v,
    q_base,
    dout_base,
    lse_ptr,
    delta_ptr,
    line,  # offset of this (batch, head) in lse and delta
    mask_base,  # at query 0 and the tile's first key
    columns,  # (BLOCK_N,) keys inside the tile
    start,
    end,
    stride_q,
    stride_dout,
    stride_mask_q,
    stride_mask_k,
    seqlen_q,
    keys_left,
    diagonal,  # query 0 sees the tile's keys j <= diagonal
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Add the query tiles [start, end) to dk and dv of one key tile."""
    rows = tl.arange(0, BLOCK_M)
    for m in range(start, end, BLOCK_M):
        first = tl.cast(m, tl.int64)
        limit = seqlen_q - m
        q = load_tile(q_base + first * stride_q, rows, stride_q, limit, HEAD_DIM, BLOCK_D, True)
        lse, delta = _row_state(lse_ptr, delta_ptr, line + m, rows, limit)
        # Keys by queries: p and ds are then left operands as they come, without a transposition.
        scores = tl.dot(k, q.T, input_precision="ieee") * scale_log2
        scores = hide(
            scores, mask_base + first * stride_mask_q, rows[None, :], columns[:, None],
            stride_mask_q, stride_mask_k, limit, keys_left, diagonal + m, CAUSAL, HAS_MASK,
            BOUNDARY,
        )  # fmt: skip
        p = tl.exp2(scores - lse[None, :])
        dout = load_tile(
            dout_base + first * stride_dout, rows, stride_dout, limit, HEAD_DIM, BLOCK_D, True
        )
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, dout.T, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["kv_heads", "group_size", "seqlen_q", "seqlen_k"])
def _keys_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim)
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim)
    v_ptr,
    dout_ptr,  # as q
    lse_ptr,  # (batch, heads, seqlen_q), contiguous
    delta_ptr,
    mask_ptr,
    key_lengths_ptr,
    dk_ptr,  # as k, contiguous
    dv_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_gb, stride_gs, stride_gh,  # of dk and dv
    kv_heads,
    group_size,
    seqlen_q,
    seqlen_k,
    softmax_scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    first_key = tl.program_id(0) % tiles_n * BLOCK_N
    batch_head = tl.program_id(0) // tiles_n
    kv_head = (batch_head % kv_heads).to(tl.int64)
    batch = (batch_head // kv_heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)

    key_limit = seqlen_k
    if HAS_KEY_LENGTHS:
        key_limit = tl.minimum(key_limit, tl.load(key_lengths_ptr + batch).to(tl.int32))
    keys_left = key_limit - first_key
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh + first_key.to(tl.int64) * stride_ks
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh + first_key.to(tl.int64) * stride_vs
    k = load_tile(k_base, columns, stride_ks, keys_left, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_base, columns, stride_vs, keys_left, HEAD_DIM, BLOCK_D, True)

    # Query tiles from the first that sees a key of this tile; below `whole` the diagonal crosses.
    # Rows of padding keys are garbage that no other row sees; they are zeroed at the end.
    diagonal = seqlen_k - seqlen_q - first_key
    start = 0
    whole = 0
    if CAUSAL:
        start = tl.maximum(-diagonal, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(BLOCK_N - 1 - diagonal, 0), BLOCK_M) * BLOCK_M
    end = seqlen_q
    if keys_left <= 0:
        end = 0
    whole = tl.minimum(whole, end)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(group_size):
        head = kv_head * group_size + g
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        dout_base = dout_ptr + batch * stride_db + head * stride_dh
        line = (batch * kv_heads * group_size + head) * seqlen_q
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base += batch * stride_mb + head * stride_mh + first_key.to(tl.int64) * stride_mk
        if CAUSAL:
            dk, dv = _accumulate_keys(
                dk, dv, k, v, q_base, dout_base, lse_ptr, delta_ptr, line, mask_base, columns,
                start, whole, stride_qs, stride_ds, stride_mq, stride_mk, seqlen_q, keys_left,
                diagonal, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, HAS_MASK, True,
            )  # fmt: skip
        dk, dv = _accumulate_keys(
            dk, dv, k, v, q_base, dout_base, lse_ptr, delta_ptr, line, mask_base, columns,
            whole, end, stride_qs, stride_ds, stride_mq, stride_mk, seqlen_q, keys_left,
            diagonal, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, HAS_MASK, False,
        )  # fmt: skip

    seen = (columns < keys_left)[:, None]
    dk = tl.where(seen, dk * softmax_scale, 0.0)
    dv = tl.where(seen, dv, 0.0)
    offset = batch * stride_gb + kv_head * stride_gh + first_key.to(tl.int64) * stride_gs
    rows_left = seqlen_k - first_key
    store_tile(dk_ptr + offset, dk, columns, stride_gs, rows_left, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr + offset, dv, columns, stride_gs, rows_left, HEAD_DIM, BLOCK_D)


@triton.jit
def _accumulate_queries(
    dq,  # (BLOCK_M, BLOCK_D)
    q,  # (BLOCK_M, BLOCK_D)
    dout,
    lse,  # (BLOCK_M,)
    delta,
    k_base,
    v_base,
    mask_base,  # at the tile's first query and key 0
    rows,  # (BLOCK_M,) queries inside the tile
    start,
    end,
    stride_k,
    stride_v,
    stride_mask_q,
    stride_mask_k,
    rows_left,
    key_limit,
    diagonal,  # the tile's first query sees the keys j <= diagonal
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Add the key tiles [start, end) to dq of one query tile."""
    columns = tl.arange(0, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        first = tl.cast(n, tl.int64)
        limit = key_limit - n
        k_tile = k_base + first * stride_k
        v_tile = v_base + first * stride_v
        k = load_tile(k_tile, columns, stride_k, limit, HEAD_DIM, BLOCK_D, BOUNDARY)
        v = load_tile(v_tile, columns, stride_v, limit, HEAD_DIM, BLOCK_D, BOUNDARY)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        scores = hide(
            scores, mask_base + first * stride_mask_k, rows[:, None], columns[None, :],
            stride_mask_q, stride_mask_k, rows_left, limit, diagonal - n, CAUSAL, HAS_MASK,
            BOUNDARY,
        )  # fmt: skip
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(dout, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["heads", "group_size", "seqlen_q", "seqlen_k"])
def _queries_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim)
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim)
    v_ptr,
    dout_ptr,  # as q
    lse_ptr,  # (batch, heads, seqlen_q), contiguous
    delta_ptr,
    mask_ptr,
    key_lengths_ptr,
    dq_ptr,  # as q, contiguous
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_gb, stride_gs, stride_gh,  # of dq
    heads,
    group_size,
    seqlen_q,
    seqlen_k,
    softmax_scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m
    batch_head = tl.program_id(0) // tiles_m
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    first_row = tile_m * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    rows_left = seqlen_q - first_row
    row64 = first_row.to(tl.int64)
    q_base = q_ptr + batch * stride_qb + head * stride_qh + row64 * stride_qs
    dout_base = dout_ptr + batch * stride_db + head * stride_dh + row64 * stride_ds
    k_base = k_ptr + batch * stride_kb + (head // group_size) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_size) * stride_vh
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += batch * stride_mb + head * stride_mh + row64 * stride_mq
    q = load_tile(q_base, rows, stride_qs, rows_left, HEAD_DIM, BLOCK_D, True)
    dout = load_tile(dout_base, rows, stride_ds, rows_left, HEAD_DIM, BLOCK_D, True)
    line = batch_head.to(tl.int64) * seqlen_q + first_row
    lse, delta = _row_state(lse_ptr, delta_ptr, line, rows, rows_left)

    key_limit = seqlen_k
    if HAS_KEY_LENGTHS:
        key_limit = tl.minimum(key_limit, tl.load(key_lengths_ptr + batch).to(tl.int32))
    diagonal = first_row + seqlen_k - seqlen_q
    end = key_limit
    whole = key_limit
    if CAUSAL:
        end = tl.minimum(end, diagonal + BLOCK_M)
        whole = tl.minimum(whole, diagonal + 1)
    whole = tl.maximum(whole, 0) // BLOCK_N * BLOCK_N

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _accumulate_queries(
        dq, q, dout, lse, delta, k_base, v_base, mask_base, rows, 0, whole, stride_ks, stride_vs,
        stride_mq, stride_mk, rows_left, key_limit, diagonal, scale_log2, HEAD_DIM, BLOCK_D,
        BLOCK_N, CAUSAL, HAS_MASK, False,
    )  # fmt: skip
    dq = _accumulate_queries(
        dq, q, dout, lse, delta, k_base, v_base, mask_base, rows, whole, end, stride_ks, stride_vs,
        stride_mq, stride_mk, rows_left, key_limit, diagonal, scale_log2, HEAD_DIM, BLOCK_D,
        BLOCK_N, CAUSAL, HAS_MASK, True,
    )  # fmt: skip
    dq_base = dq_ptr + batch * stride_gb + head * stride_gh + row64 * stride_gs
    store_tile(dq_base, dq * softmax_scale, rows, stride_gs, rows_left, HEAD_DIM, BLOCK_D)


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), each shaped as its input and contiguous."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    q, k, v, dout, out = (readable(x) for x in (q, k, v, dout, out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    architecture, size = launch.architecture(q.device), q.element_size()
    width = tiles.block_d(head_dim)

    launch.launch(
        _delta_kernel,
        (triton.cdiv(seqlen_q, 32) * heads * batch,),
        dout,
        out,
        delta if dlse is None else dlse.contiguous(),
        delta,
        *dout.stride()[:3],
        *out.stride()[:3],
        heads,
        seqlen_q,
        HEAD_DIM=head_dim,
        BLOCK_D=width,
        BLOCK_M=32,
        HAS_DLSE=dlse is not None,
        num_warps=4,
        num_stages=1,
    )
    lengths = q if key_lengths is None else key_lengths
    seen = mask_bytes(mask, q)
    shared = (q, k, v, dout, lse.contiguous(), delta, seen, lengths)
    strides = (
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *dout.stride()[:3],
        *mask_strides(mask, seen),
    )
    sizes = (heads // kv_heads, seqlen_q, seqlen_k, softmax_scale, softmax_scale * LOG2_E)
    switches = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": width,
        "CAUSAL": causal,
        "HAS_MASK": mask is not None,
        "HAS_KEY_LENGTHS": key_lengths is not None,
    }
    tile = tiles.tile(tiles.KEYS, architecture, size, head_dim, mask is not None)
    launch.launch(
        _keys_kernel,
        (triton.cdiv(seqlen_k, tile.block_n) * kv_heads * batch,),
        *shared,
        dk,
        dv,
        *strides,
        *dk.stride()[:3],
        kv_heads,
        *sizes,
        **switches,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = tiles.tile(tiles.QUERIES, architecture, size, head_dim, mask is not None)
    launch.launch(
        _queries_kernel,
        (triton.cdiv(seqlen_q, tile.block_m) * heads * batch,),
        *shared,
        dq,
        *strides,
        *dq.stride()[:3],
        heads,
        *sizes,
        **switches,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq, dk, dv
