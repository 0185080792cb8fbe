"""Attention backward, without atomics: each output is written by one program.

With s the scores of scores.py, p = exp(s - lse) recomputed tile by tile, and D the dropout (0 or
1 / (1 - dropout_p) at each weight),

    delta = rowsum(dO * out) - dlse                     (preprocess; or rowsum(p * D dO v^T))
    dV = (D p)^T dO,   dS = p * (D dO v^T - delta)
    dbias = dS,        dsink = -sum exp(sink - lse) delta
    dX = dS * (1 - tanh^2)                              (through the softcap)
    dK = softmax_scale dX^T q                           (by key tile, over its queries)
    dQ = softmax_scale dX k                             (by query tile, over its keys)

(Dao 2023, arXiv:2307.08691, with the gradient of the LSE: dlse/ds = p.) Recomputing p in both loops
costs seven products instead of the five of one loop with atomics, and buys equal bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import dropout, sink, tiles
from fastattn.ops.attention.call import Extras, Settings, no_sequence
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.bias import bias_gradient
from fastattn.ops.attention.triton.documents import tile_ranges
from fastattn.ops.attention.triton.scores import (
    LOG2_E,
    clear_rows,
    gap,
    held,
    keep_tile,
    key_range,
    load_tile,
    row_state,
    score_tile,
    sequence,
    store_tile,
)
from fastattn.ops.common import launch
from fastattn.ops.common.plans import PlanCache


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
    dout_base = dout_ptr + (batch * stride_db + head * stride_dh + first * stride_ds) * ALIGN
    out_base = out_ptr + (batch * stride_ob + head * stride_oh + first * stride_os) * ALIGN
    dout = load_tile(dout_base, rows * (stride_ds * ALIGN), inside, HEAD_DIM, BLOCK_D)
    out = load_tile(out_base, rows * (stride_os * ALIGN), inside, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    line = batch_head.to(tl.int64) * seqlen_q + first_row + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + line, mask=inside, other=0.0)
    tl.store(delta_ptr + line, delta, mask=inside)


@triton.jit
def _accumulate_keys(
    dk,  # (BLOCK_N, BLOCK_D)
    dv,  # (BLOCK_N, BLOCK_DV)
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_DV)
    q_base,  # at query 0
    dout_base,
    lse_ptr,
    delta_ptr,
    line,  # offset of query 0 in lse and delta
    indices_ptr,  # lists of kept tiles, or None
    partial_ptr,
    patterns_ptr,
    start,  # queries from start to end; with lists: places in them, times their subtiles
    end,
    j,  # (BLOCK_N, 1)
    length_q,
    key_limit,
    low,
    high,
    shift,
    mask_base,  # at query 0 and the tile's first key
    bias_base,
    slope,
    q_documents_ptr,
    k_documents,  # (BLOCK_N, 1)
    pattern_column,  # (BLOCK_N, 1) columns inside a tile of the block mask
    seed,
    plane,
    first_key,
    threshold,
    inverse_keep,
    scale,
    softcap,
    strides,  # (q, dout, mask from query to query, mask from key to key, bias likewise)
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr,
    BLOCK_MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Add query tiles to dk and dv of one key tile."""
    HIDES: tl.constexpr = (
        BOUNDARY
        or indices_ptr is not None
        or mask_base is not None
        or bias_base is not None
        or q_documents_ptr is not None
    )
    stride_q, stride_dout, stride_mq, stride_mk, stride_bq, stride_bk = strides
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    step: tl.constexpr = 1 if indices_ptr is not None else BLOCK_M
    for t in range(start, end, step):
        m = t
        pattern_rows = None
        if indices_ptr is not None:
            subtiles: tl.constexpr = BLOCK_MASK_Q // BLOCK_M
            entry = t // subtiles
            inner = t % subtiles * BLOCK_M
            m = tl.load(indices_ptr + entry) * BLOCK_MASK_Q + inner
            if patterns_ptr is not None:
                number = tl.load(partial_ptr + entry).to(tl.int64)
                pattern_rows = patterns_ptr + number * (BLOCK_MASK_Q * BLOCK_MASK_K)
                pattern_rows += (inner + rows)[None, :] * BLOCK_MASK_K
        first = tl.cast(m, tl.int64)
        inside = rows < length_q - m
        i = (m + rows)[None, :]
        q = load_tile(q_base + first * stride_q, rows * stride_q, inside, HEAD_DIM, BLOCK_D)
        lse, delta = row_state(lse_ptr, delta_ptr, line + m, rows, length_q - m)
        mask_corner = None
        if mask_base is not None:
            mask_corner = mask_base + first * stride_mq
        bias_corner = None
        if bias_base is not None:
            bias_corner = bias_base + first * stride_bq
        q_documents = None
        if q_documents_ptr is not None:
            q_documents = tl.load(q_documents_ptr + m + rows, mask=inside, other=0)[None, :]
        # Keys by queries: p and ds are then left operands as they come, without a transposition.
        scores, slope_of_cap = score_tile(
            tl.dot(k, q.T, input_precision=PRECISION), i, j, inside[None, :], key_limit, low, high,
            shift, None, mask_corner, rows[None, :] * stride_mq, columns[:, None] * stride_mk,
            bias_corner, rows[None, :] * stride_bq, columns[:, None] * stride_bk, slope,
            q_documents, k_documents, pattern_rows, pattern_column, scale, softcap, BOUNDARY, True,
        )  # fmt: skip
        p = tl.exp2(scores - lse[None, :])
        if HIDES:  # a row that sees no key: whatever gradient arrives, p = 0 takes none of it
            inside = inside & (lse < float("inf"))
        dout = load_tile(
            dout_base + first * stride_dout, rows * stride_dout, inside, HEAD_DIM_V, BLOCK_DV
        )
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        if seed is not None:
            keep = keep_tile(seed, plane, i, first_key, threshold, BLOCK_N, True)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
            kept = tl.where(keep, p * inverse_keep, 0.0)
        else:
            kept = p
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if softcap is not None:
            ds *= slope_of_cap
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=launching.SIZES)
def _keys_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim); packed: batch 1
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim)
    v_ptr,
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v)
    lse_ptr,  # (batch, heads, seqlen_q), contiguous; packed: (heads, total_q)
    delta_ptr,
    dk_ptr,  # as k, contiguous
    dv_ptr,
    mask_ptr,
    bias_ptr,
    slopes_ptr,
    key_lengths_ptr,
    q_documents_ptr,
    k_documents_ptr,
    ranges_ptr,  # (batch, tiles_n, 2): queries that the documents leave
    block_offsets_ptr,  # of the transposed block mask
    block_indices_ptr,
    block_partial_ptr,
    block_patterns_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    seed_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, but those of lse
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh,
    stride_gb, stride_gs, stride_gh,  # of dk
    stride_ob, stride_os, stride_oh,  # of dv
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq, stride_mk,
    stride_bb: tl.int64, stride_bh: tl.int64, stride_bq, stride_bk,
    stride_slope,
    stride_qd, stride_kd,
    stride_block_b, stride_block_h,
    kv_heads,
    group_size,
    seqlen_q,
    seqlen_k,
    tiles_n,
    low,
    high,
    softmax_scale,
    scale,
    softcap,
    threshold,
    inverse_keep,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr,
    BLOCK_MASK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0) % tiles_n
    batch_head = tl.program_id(0) // tiles_n
    kv_head = (batch_head % kv_heads).to(tl.int64)
    batch = (batch_head // kv_heads).to(tl.int64)
    q_start, length_q = sequence(cu_seqlens_q_ptr, seqused_q_ptr, batch, seqlen_q)
    k_start, length_k = sequence(cu_seqlens_k_ptr, seqused_k_ptr, batch, seqlen_k)
    first_key = tile_n * BLOCK_N
    if cu_seqlens_k_ptr is not None:
        covered = tl.minimum(length_k, tiles_n * BLOCK_N)
        sequences = tl.num_programs(0) // tiles_n // kv_heads
        gap_first, gap_end = gap(cu_seqlens_k_ptr, batch, sequences, k_start, covered, seqlen_k)
        clear_rows(
            dk_ptr, gap_first, gap_end, tile_n, tiles_n, kv_heads, kv_head, BLOCK_N, HEAD_DIM,
            BLOCK_D,
        )  # fmt: skip
        clear_rows(
            dv_ptr, gap_first, gap_end, tile_n, tiles_n, kv_heads, kv_head, BLOCK_N, HEAD_DIM_V,
            BLOCK_DV,
        )  # fmt: skip
        if first_key >= length_k:
            return
    shift = length_k - length_q
    key_limit = length_k
    if key_lengths_ptr is not None:
        key_limit = held(key_lengths_ptr, batch, key_limit, 0)

    columns = tl.arange(0, BLOCK_N)
    inside = columns < key_limit - first_key
    token = k_start + first_key
    ks = stride_ks * ALIGN
    vs = stride_vs * ALIGN
    k_base = k_ptr + (batch * stride_kb + kv_head * stride_kh) * ALIGN + token * ks
    v_base = v_ptr + (batch * stride_vb + kv_head * stride_vh) * ALIGN + token * vs
    k = load_tile(k_base, columns * ks, inside, HEAD_DIM, BLOCK_D)
    v = load_tile(v_base, columns * vs, inside, HEAD_DIM_V, BLOCK_DV)
    j = (first_key + columns)[:, None]
    k_documents = None
    if k_documents_ptr is not None:
        k_documents = k_documents_ptr + batch * stride_kd + k_start

    lowest = None
    if low is not None:
        lowest = low
        if not TOP_LEFT:
            lowest += shift
    highest = None
    if high is not None:
        highest = high
        if not TOP_LEFT:
            highest += shift
    # Queries from the first to the last that see a key of this tile; from `whole_start` to
    # `whole_end` they see all of them. Rows of padding keys are garbage that no other row sees;
    # they are zeroed at the end.
    start = 0
    whole_start = 0
    end = length_q
    if ranges_ptr is not None:
        pair = ranges_ptr + (batch * tiles_n + tile_n) * 2
        start = tl.load(pair)
        end = tl.minimum(end, tl.load(pair + 1))
    if key_limit <= first_key:
        end = 0
    whole_end = end
    if highest is not None:
        start = tl.maximum(start, first_key - highest)
        whole_start = first_key + BLOCK_N - 1 - highest
    if lowest is not None:
        end = tl.minimum(end, tl.minimum(first_key + BLOCK_N, key_limit) - lowest)
        whole_end = tl.minimum(whole_end, first_key - lowest + 1)
    first = tl.maximum(start, 0)
    start = first // BLOCK_M * BLOCK_M
    end = tl.where(first < end, end, start)
    whole_end = tl.minimum(whole_end, end)
    whole_start = tl.minimum(tl.cdiv(tl.maximum(whole_start, 0), BLOCK_M), tl.cdiv(end, BLOCK_M))
    whole_start = tl.maximum(whole_start * BLOCK_M, start)
    if low is not None:
        whole_end = tl.maximum(whole_end, 0) // BLOCK_M * BLOCK_M
    whole_end = tl.maximum(whole_end, whole_start)

    strides = (
        stride_qs * ALIGN, stride_ds * ALIGN, stride_mq, stride_mk, stride_bq, stride_bk,
    )  # fmt: skip
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for g in range(group_size):
        head = kv_head * group_size + g
        heads = kv_heads * group_size
        q_base = q_ptr + (batch * stride_qb + head * stride_qh) * ALIGN
        q_base += q_start * stride_qs * ALIGN
        dout_base = dout_ptr + (batch * stride_db + head * stride_dh) * ALIGN
        dout_base += q_start * stride_ds * ALIGN
        line = batch * stride_lb + head * stride_lh + q_start
        mask_base = None
        if mask_ptr is not None:
            mask_base = mask_ptr + batch * stride_mb + head * stride_mh
            mask_base += first_key.to(tl.int64) * stride_mk
        bias_base = None
        if bias_ptr is not None:
            bias_base = bias_ptr + batch * stride_bb + head * stride_bh
            bias_base += first_key.to(tl.int64) * stride_bk
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * stride_slope + head) * LOG2_E
        q_documents = None
        if q_documents_ptr is not None:
            q_documents = q_documents_ptr + batch * stride_qd + q_start
        plane = None
        if seed_ptr is not None:
            plane = batch * heads + head
        if block_offsets_ptr is not None:
            lists = block_offsets_ptr + batch * stride_block_b + head * stride_block_h
            lists += first_key // BLOCK_MASK_K
            subtiles: tl.constexpr = BLOCK_MASK_Q // BLOCK_M
            dk, dv = _accumulate_keys(
                dk, dv, k, v, q_base, dout_base, lse_ptr, delta_ptr, line, block_indices_ptr,
                block_partial_ptr, block_patterns_ptr, tl.load(lists) * subtiles,
                tl.load(lists + 1) * subtiles, j, length_q, key_limit, lowest, highest, shift,
                mask_base, bias_base, slope, q_documents, k_documents, j % BLOCK_MASK_K, seed,
                plane, first_key, threshold, inverse_keep, scale, softcap, strides, HEAD_DIM,
                HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_MASK_Q, BLOCK_MASK_K,
                PRECISION, True,
            )  # fmt: skip
        else:
            if high is not None:
                dk, dv = _accumulate_keys(
                    dk, dv, k, v, q_base, dout_base, lse_ptr, delta_ptr, line, None, None, None,
                    start, whole_start, j, length_q, key_limit, lowest, highest, shift, mask_base,
                    bias_base, slope, q_documents, k_documents, None, seed, plane, first_key,
                    threshold, inverse_keep, scale, softcap, strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                    BLOCK_DV, BLOCK_M, BLOCK_N, 0, 0, PRECISION, True,
                )  # fmt: skip
            dk, dv = _accumulate_keys(
                dk, dv, k, v, q_base, dout_base, lse_ptr, delta_ptr, line, None, None, None,
                whole_start, whole_end, j, length_q, key_limit, lowest, highest, shift, mask_base,
                bias_base, slope, q_documents, k_documents, None, seed, plane, first_key, threshold,
                inverse_keep, scale, softcap, strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, 0, 0, PRECISION, False,
            )  # fmt: skip
            if low is not None:
                dk, dv = _accumulate_keys(
                    dk, dv, k, v, q_base, dout_base, lse_ptr, delta_ptr, line, None, None, None,
                    whole_end, end, j, length_q, key_limit, lowest, highest, shift, mask_base,
                    bias_base, slope, q_documents, k_documents, None, seed, plane, first_key,
                    threshold, inverse_keep, scale, softcap, strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                    BLOCK_DV, BLOCK_M, BLOCK_N, 0, 0, PRECISION, True,
                )  # fmt: skip

    dk = tl.where(inside[:, None], dk * softmax_scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    exists = columns < length_k - first_key
    dk_base = dk_ptr + (batch * stride_gb + kv_head * stride_gh + token * stride_gs) * ALIGN
    dv_base = dv_ptr + (batch * stride_ob + kv_head * stride_oh + token * stride_os) * ALIGN
    store_tile(dk_base, dk, columns * (stride_gs * ALIGN), exists, HEAD_DIM, BLOCK_D)
    store_tile(dv_base, dv, columns * (stride_os * ALIGN), exists, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def _accumulate_queries(
    dq,  # (BLOCK_M, BLOCK_D)
    q,
    dout,  # (BLOCK_M, BLOCK_DV)
    lse,  # (BLOCK_M,)
    delta,
    k_base,  # at key 0
    v_base,
    indices_ptr,  # lists of kept tiles, or None
    partial_ptr,
    patterns_ptr,
    start,  # keys from start to end; with lists: places in them, times their subtiles
    end,
    i,  # (BLOCK_M, 1)
    rows_inside,  # (BLOCK_M, 1)
    key_limit,
    low,
    high,
    shift,
    mask_base,  # at the tile's first query and key 0
    bias_base,
    slope,
    q_documents,
    k_documents_ptr,
    pattern_row,
    seed,
    plane,
    threshold,
    inverse_keep,
    scale,
    softcap,
    strides,  # (k, v) from key to key, mask from query to query and key to key, bias likewise
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr,
    BLOCK_MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Add key tiles to dq of one query tile; with ROW_SUMS to rowsum(p * D dO v^T), (BLOCK_M,)."""
    stride_k, stride_v, stride_mq, stride_mk, stride_bq, stride_bk = strides
    columns = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, i.shape[0])[:, None]
    step: tl.constexpr = 1 if indices_ptr is not None else BLOCK_N
    for t in range(start, end, step):
        n = t
        pattern_rows = None
        pattern_columns = None
        if indices_ptr is not None:
            subtiles: tl.constexpr = BLOCK_MASK_K // BLOCK_N
            entry = t // subtiles
            inner = t % subtiles * BLOCK_N
            n = tl.load(indices_ptr + entry) * BLOCK_MASK_K + inner
            if patterns_ptr is not None:
                number = tl.load(partial_ptr + entry).to(tl.int64)
                pattern_rows = patterns_ptr + number * (BLOCK_MASK_Q * BLOCK_MASK_K) + pattern_row
                pattern_columns = inner + columns[None, :]
        first = tl.cast(n, tl.int64)
        inside = None
        if BOUNDARY:
            inside = columns < key_limit - n
        k = load_tile(k_base + first * stride_k, columns * stride_k, inside, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base + first * stride_v, columns * stride_v, inside, HEAD_DIM_V, BLOCK_DV)
        mask_corner = None
        if mask_base is not None:
            mask_corner = mask_base + first * stride_mk
        bias_corner = None
        if bias_base is not None:
            bias_corner = bias_base + first * stride_bk
        scores, slope_of_cap = score_tile(
            tl.dot(q, k.T, input_precision=PRECISION), i, (n + columns)[None, :], rows_inside,
            key_limit, low, high, shift, None, mask_corner, rows * stride_mq,
            columns[None, :] * stride_mk, bias_corner, rows * stride_bq,
            columns[None, :] * stride_bk, slope, q_documents, k_documents_ptr, pattern_rows,
            pattern_columns, scale, softcap, BOUNDARY, BOUNDARY,
        )  # fmt: skip
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        if seed is not None:
            keep = keep_tile(seed, plane, i, n, threshold, BLOCK_N, False)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        if ROW_SUMS:
            dq += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - delta[:, None])
            if softcap is not None:
                ds *= slope_of_cap
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=launching.SIZES)
def _queries_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim); packed: batch 1
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim)
    v_ptr,
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v)
    lse_ptr,  # (batch, heads, seqlen_q), contiguous; packed: (heads, total_q)
    delta_ptr,
    dq_ptr,  # as q, contiguous; with ROW_SUMS as delta
    mask_ptr,
    bias_ptr,
    slopes_ptr,
    key_lengths_ptr,
    q_documents_ptr,
    k_documents_ptr,
    ranges_ptr,  # (batch, tiles_m, 2): keys that the documents leave
    block_offsets_ptr,
    block_indices_ptr,
    block_partial_ptr,
    block_patterns_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    seed_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, but those of lse
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh,
    stride_gb, stride_gs, stride_gh,  # of dq
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq, stride_mk,
    stride_bb: tl.int64, stride_bh: tl.int64, stride_bq, stride_bk,
    stride_slope,
    stride_qd, stride_kd,
    stride_block_b, stride_block_h,
    heads,
    group_size,
    seqlen_q,
    seqlen_k,
    tiles_m,
    low,
    high,
    softmax_scale,
    scale,
    softcap,
    threshold,
    inverse_keep,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr,
    BLOCK_MASK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_SUMS: tl.constexpr,
):  # fmt: skip
    tile_m = tl.program_id(0) % tiles_m
    if high is not None:
        tile_m = tiles_m - 1 - tile_m
    batch_head = tl.program_id(0) // tiles_m
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    kv_head = head // group_size
    q_start, length_q = sequence(cu_seqlens_q_ptr, seqused_q_ptr, batch, seqlen_q)
    k_start, length_k = sequence(cu_seqlens_k_ptr, seqused_k_ptr, batch, seqlen_k)
    first_row = tile_m * BLOCK_M
    if cu_seqlens_q_ptr is not None:
        if not ROW_SUMS:
            covered = tl.minimum(length_q, tiles_m * BLOCK_M)
            sequences = tl.num_programs(0) // tiles_m // heads
            gap_first, gap_end = gap(cu_seqlens_q_ptr, batch, sequences, q_start, covered, seqlen_q)
            clear_rows(
                dq_ptr, gap_first, gap_end, tile_m, tiles_m, heads, head, BLOCK_M, HEAD_DIM, BLOCK_D
            )
        if first_row >= length_q:
            return
    shift = length_k - length_q
    key_limit = length_k
    if key_lengths_ptr is not None:
        key_limit = held(key_lengths_ptr, batch, key_limit, 0)

    rows = tl.arange(0, BLOCK_M)
    inside = rows < length_q - first_row
    token = q_start + first_row
    qs = stride_qs * ALIGN
    ds = stride_ds * ALIGN
    q_base = q_ptr + (batch * stride_qb + head * stride_qh) * ALIGN + token * qs
    dout_base = dout_ptr + (batch * stride_db + head * stride_dh) * ALIGN + token * ds
    q = load_tile(q_base, rows * qs, inside, HEAD_DIM, BLOCK_D)
    line = batch * stride_lb + head * stride_lh + token
    lse, delta = row_state(lse_ptr, delta_ptr, line, rows, length_q - first_row)
    seen = lse < float("inf")  # of rows that see no key no gradient is taken, whatever arrives
    dout = load_tile(dout_base, rows * ds, inside & seen, HEAD_DIM_V, BLOCK_DV)
    k_base = k_ptr + (batch * stride_kb + kv_head * stride_kh + k_start * stride_ks) * ALIGN
    v_base = v_ptr + (batch * stride_vb + kv_head * stride_vh + k_start * stride_vs) * ALIGN

    i = (first_row + rows)[:, None]
    first = first_row.to(tl.int64)
    mask_base = None
    if mask_ptr is not None:
        mask_base = mask_ptr + batch * stride_mb + head * stride_mh + first * stride_mq
    bias_base = None
    if bias_ptr is not None:
        bias_base = bias_ptr + batch * stride_bb + head * stride_bh + first * stride_bq
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * stride_slope + head) * LOG2_E
    q_documents = None
    k_documents = None
    if q_documents_ptr is not None:
        ids = q_documents_ptr + batch * stride_qd + token + rows
        q_documents = tl.load(ids, mask=inside, other=0)[:, None]
        k_documents = k_documents_ptr + batch * stride_kd + k_start
    seed = None
    plane = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        plane = batch * heads + head

    lowest = None
    if low is not None:
        lowest = low
        if not TOP_LEFT:
            lowest += shift
    highest = None
    if high is not None:
        highest = high
        if not TOP_LEFT:
            highest += shift
    strides = (
        stride_ks * ALIGN, stride_vs * ALIGN, stride_mq, stride_mk, stride_bq, stride_bk,
    )  # fmt: skip
    if ROW_SUMS:
        dq = tl.zeros((BLOCK_M,), tl.float32)
    else:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if block_offsets_ptr is not None:
        lists = block_offsets_ptr + batch * stride_block_b + head * stride_block_h
        lists += first_row // BLOCK_MASK_Q
        subtiles: tl.constexpr = BLOCK_MASK_K // BLOCK_N
        dq = _accumulate_queries(
            dq, q, dout, lse, delta, k_base, v_base, block_indices_ptr, block_partial_ptr,
            block_patterns_ptr, tl.load(lists) * subtiles, tl.load(lists + 1) * subtiles, i,
            inside[:, None], key_limit, lowest, highest, shift, mask_base, bias_base, slope,
            q_documents, k_documents, i % BLOCK_MASK_Q * BLOCK_MASK_K, seed, plane, threshold,
            inverse_keep, scale, softcap, strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
            BLOCK_MASK_Q, BLOCK_MASK_K, PRECISION, ROW_SUMS, True,
        )  # fmt: skip
    else:
        begin = 0
        end = key_limit
        if ranges_ptr is not None:
            pair = ranges_ptr + (batch * tiles_m + tile_m) * 2
            begin = tl.load(pair)
            end = tl.minimum(end, tl.load(pair + 1))
        last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
        start, whole_start, whole_end, end = key_range(
            first_row, last_row, begin, end, lowest, highest, BLOCK_N, low is not None
        )
        if low is not None:
            dq = _accumulate_queries(
                dq, q, dout, lse, delta, k_base, v_base, None, None, None, start, whole_start, i,
                inside[:, None], key_limit, lowest, highest, shift, mask_base, bias_base, slope,
                q_documents, k_documents, None, seed, plane, threshold, inverse_keep, scale,
                softcap, strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, 0, 0, PRECISION,
                ROW_SUMS, True,
            )  # fmt: skip
        dq = _accumulate_queries(
            dq, q, dout, lse, delta, k_base, v_base, None, None, None, whole_start, whole_end, i,
            inside[:, None], key_limit, lowest, highest, shift, mask_base, bias_base, slope,
            q_documents, k_documents, None, seed, plane, threshold, inverse_keep, scale, softcap,
            strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, 0, 0, PRECISION, ROW_SUMS,
            False,
        )  # fmt: skip
        dq = _accumulate_queries(
            dq, q, dout, lse, delta, k_base, v_base, None, None, None, whole_end, end, i,
            inside[:, None], key_limit, lowest, highest, shift, mask_base, bias_base, slope,
            q_documents, k_documents, None, seed, plane, threshold, inverse_keep, scale, softcap,
            strides, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, 0, 0, PRECISION, ROW_SUMS,
            True,
        )  # fmt: skip
    if ROW_SUMS:
        tl.store(dq_ptr + line + rows, dq, mask=inside)
    else:
        gs = stride_gs * ALIGN
        dq_base = dq_ptr + (batch * stride_gb + head * stride_gh) * ALIGN + token * gs
        store_tile(dq_base, dq * softmax_scale, rows * gs, inside, HEAD_DIM, BLOCK_D)


class _Plan(NamedTuple):
    """What follows from a call's metadata."""

    x: launching.Layout  # its strides are those of q, k, v, dout and out
    copies: bool  # whether the kernels need copies of inputs
    delta: launch.Prepared
    row_sums: launch.Prepared
    keys: launch.Prepared
    queries: launch.Prepared
    tile_m: int  # of the queries' kernel
    tiles_m: int
    tile_n: int  # of the keys' kernel
    tiles_n: int


_plans: PlanCache[_Plan] = PlanCache()


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias_grad: bool,
    sink_grad: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, dbias, dsink), each shaped as its input and contiguous.

    dbias and dsink are empty where they are not wanted.
    """
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if no_sequence(extras, settings.max_seqlen_q):
        dq.zero_()
    if no_sequence(extras, settings.max_seqlen_k):
        dk.zero_()
        dv.zero_()
    lse = lse.contiguous()
    key = launching.key(q, k, v, extras, settings, dout, out, dlse)
    plan = _plans.get(key)
    if plan is None or plan.copies:
        (q, k, v, dout, out), extras, copies = launching.prepared(extras, q, k, v, dout, out)
        if plan is None:
            plan = _plan(dout, out, q, k, v, extras, settings, copies)
            _plans.put(key, plan)
    x = plan.x
    mask, bias, slopes, _, *rest = launching.feature_pointers(extras)
    features = (mask, bias, slopes, *rest)
    sequences = (*launching.sequence_pointers(extras), extras.dropout_seed)
    of_queries = of_keys = None
    if extras.q_documents is not None:
        of_queries = tile_ranges(x, extras, plan.tile_m, plan.tiles_m, of_queries=True)
        of_keys = tile_ranges(x, extras, plan.tile_n, plan.tiles_n, of_queries=False)
    by_queries = (
        *features, of_queries, *launching.block_pointers(extras, transposed=False), *sequences
    )  # fmt: skip
    by_keys = (*features, of_keys, *launching.block_pointers(extras, transposed=True), *sequences)

    if bias_grad and x.element_size < 4:
        # dS summed over many rows shows what rounding of `out` does to its row sum: compute it.
        delta = torch.empty_like(lse)
        plan.row_sums(q, k, v, dout, lse, delta, delta, *by_queries)
        delta = delta if dlse is None else delta - dlse
    else:
        delta = torch.empty_like(lse)
        plan.delta(dout, out, None if dlse is None else dlse.contiguous(), delta)
    plan.keys(q, k, v, dout, lse, delta, dk, dv, *by_keys)
    plan.queries(q, k, v, dout, lse, delta, dq, *by_queries)
    dbias, dsink = q.new_empty((0,)), q.new_empty((0,))
    if bias_grad:
        dbias = bias_gradient(x, q, k, v, dout, lse, delta, extras, settings)
    if sink_grad:
        assert extras.sink is not None
        dsink = sink.gradient(lse, delta, extras.sink)
    return dq, dk, dv, dbias, dsink


DELTA_ROWS = 32


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
    architecture = launch.architecture(x.device)
    width, masking = max(x.head_dim, x.head_dim_v), tiles.masking(extras, settings)
    strides = (*x.strides[:12], *launching.lse_strides(x))
    group_size = x.heads // x.kv_heads
    numbers = (
        *launching.band(settings),
        launching.in_float32(settings.softmax_scale),
        launching.scale(settings),
        launching.softcap(settings),
        dropout.threshold(settings.dropout_p),
        1.0 / (1.0 - settings.dropout_p),
    )
    switches = {
        **x.widths(),
        "BLOCK_MASK_Q": settings.block_q,
        "BLOCK_MASK_K": settings.block_k,
        "TOP_LEFT": settings.top_left,
        "PRECISION": settings.fp32_precision,
    }

    def tile_of(kernel: str) -> tiles.Tile:
        tile = tiles.tile(kernel, architecture, x.element_size, width, masking)
        return tile.within(settings.block_q, settings.block_k)

    def of_tile(tile: tiles.Tile) -> dict[str, int]:
        return {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

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

    tile_n = tile_of(tiles.KEYS)
    tiles_n = triton.cdiv(x.longest_k, tile_n.block_n)
    keys = launch.Prepared(
        _keys_kernel,
        (tiles_n * x.kv_heads * x.batch,),
        (
            *strides,
            *launching.result_strides(x, x.kv_heads, x.seqlen_k, x.head_dim),
            *launching.result_strides(x, x.kv_heads, x.seqlen_k, x.head_dim_v),
            *launching.feature_strides(x, extras),
            *launching.block_strides(extras, transposed=True),
            x.kv_heads, group_size, x.seqlen_q, x.seqlen_k, tiles_n, *numbers,
        ),
        **switches,
        **of_tile(tile_n),
    )  # fmt: skip

    tile_m = tile_of(tiles.QUERIES)
    tiles_m = triton.cdiv(x.longest_q, tile_m.block_m)
    row_sums, queries = (
        launch.Prepared(
            _queries_kernel,
            (tiles_m * x.heads * x.batch,),
            (
                *strides,
                *launching.result_strides(x, x.heads, x.seqlen_q, x.head_dim),
                *launching.feature_strides(x, extras),
                *launching.block_strides(extras, transposed=False),
                x.heads, group_size, x.seqlen_q, x.seqlen_k, tiles_m, *numbers,
            ),
            **switches,
            **of_tile(tile_m),
            ROW_SUMS=row_sums,
        )
        for row_sums in (True, False)
    )  # fmt: skip
    return _Plan(
        x, copies, delta, row_sums, keys, queries, tile_m.block_m, tiles_m, tile_n.block_n, tiles_n
    )
