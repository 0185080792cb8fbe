"""The gradient of an additive bias: dS summed over the dimensions in which the bias is broadcast.

One program writes one tile of the gradient. It recomputes the dS of every (batch, head) that shares
the tile and adds them up in order, so the sum has the same bits in every run. Where the bias has
one row for all queries, a program goes through all query tiles of one (batch, head) instead, and
the (small) results are added up by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import dropout, tiles
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.scores import (
    LOG2_E,
    held,
    keep_tile,
    load_tile,
    row_state,
    score_tile,
    sequence,
)
from fastattn.ops.common import launch


@triton.jit(do_not_specialize=[*launching.SIZES, "shared_batches", "shared_heads"])
def _bias_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim); packed: batch 1
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dbias_ptr,  # (batch | 1, heads | 1, seqlen_q | 1, seqlen_k), contiguous, float32
    mask_ptr,
    bias_ptr,
    slopes_ptr,
    key_lengths_ptr,
    q_documents_ptr,
    k_documents_ptr,
    block_offsets_ptr,
    block_indices_ptr,
    block_partial_ptr,
    block_patterns_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_q_ptr,
    seqused_k_ptr,
    seed_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, like those of k, v and dout
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gs,  # of dbias: batch, head, query
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
    tiles_n,
    longest_q,
    longest_k,
    shared_batches,  # batches and heads that one program adds up
    shared_heads,
    low,
    high,
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
    ONE_ROW: tl.constexpr,  # the bias has one row for all queries
    TOP_LEFT: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first_key = program % tiles_n * BLOCK_N
    program = program // tiles_n
    tiles_here = tiles_m
    first_tile = 0
    if not ONE_ROW:
        first_tile = program % tiles_m
        tiles_here = 1
        program = program // tiles_m
    own_heads = heads // shared_heads
    own_head = program % own_heads
    own_batch = program // own_heads
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    j = (first_key + columns)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for shared in range(shared_batches * shared_heads * tiles_here):
        tile_m = first_tile + shared % tiles_here
        head = (own_head * shared_heads + shared // tiles_here % shared_heads).to(tl.int64)
        batch = (own_batch * shared_batches + shared // tiles_here // shared_heads).to(tl.int64)
        first_row = tile_m * BLOCK_M
        q_start, length_q = sequence(cu_seqlens_q_ptr, seqused_q_ptr, batch, seqlen_q)
        k_start, length_k = sequence(cu_seqlens_k_ptr, seqused_k_ptr, batch, seqlen_k)
        shift = length_k - length_q
        key_limit = length_k
        if key_lengths_ptr is not None:
            key_limit = held(key_lengths_ptr, batch, key_limit, 0)
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
        i = (first_row + rows)[:, None]
        inside = i < length_q
        line = batch * stride_lb + head * stride_lh + q_start + first_row
        there = rows < length_q - first_row
        lse, delta = row_state(lse_ptr, delta_ptr, line, rows, length_q - first_row)
        q_token = q_start + first_row
        k_token = k_start + first_key
        kv_head = head // group_size
        qs = stride_qs * ALIGN
        ks = stride_ks * ALIGN
        vs = stride_vs * ALIGN
        ds_ = stride_ds * ALIGN
        q_base = q_ptr + (batch * stride_qb + head * stride_qh) * ALIGN + q_token * qs
        dout_base = dout_ptr + (batch * stride_db + head * stride_dh) * ALIGN + q_token * ds_
        k_base = k_ptr + (batch * stride_kb + kv_head * stride_kh) * ALIGN + k_token * ks
        v_base = v_ptr + (batch * stride_vb + kv_head * stride_vh) * ALIGN + k_token * vs
        exists = columns < key_limit - first_key
        q = load_tile(q_base, rows * qs, there, HEAD_DIM, BLOCK_D)
        k = load_tile(k_base, columns * ks, exists, HEAD_DIM, BLOCK_D)
        first = first_row.to(tl.int64)
        mask_corner = None
        if mask_ptr is not None:
            mask_corner = mask_ptr + batch * stride_mb + head * stride_mh + first * stride_mq
            mask_corner += first_key.to(tl.int64) * stride_mk
        bias_corner = bias_ptr + batch * stride_bb + head * stride_bh + first * stride_bq
        bias_corner += first_key.to(tl.int64) * stride_bk
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * stride_slope + head) * LOG2_E
        q_documents = None
        k_documents = None
        if q_documents_ptr is not None:
            ids = q_documents_ptr + batch * stride_qd + q_token + rows
            q_documents = tl.load(ids, mask=there, other=0)[:, None]
            k_documents = k_documents_ptr + batch * stride_kd + k_start
        scores, _ = score_tile(
            tl.dot(q, k.T, input_precision=PRECISION), i, j, inside, key_limit, lowest, highest,
            shift, None, mask_corner, rows[:, None] * stride_mq, columns[None, :] * stride_mk,
            bias_corner, rows[:, None] * stride_bq, columns[None, :] * stride_bk, slope,
            q_documents, k_documents, None, None, scale, softcap, True, True,
        )  # fmt: skip
        if block_offsets_ptr is not None:
            # Whether the tile is kept, by a search of its row's list; what hides it is p = 0.
            lists = block_offsets_ptr + batch * stride_block_b + head * stride_block_h
            lists += first_row // BLOCK_MASK_Q
            kept = (i < 0) & (j < 0)
            for entry in range(tl.load(lists), tl.load(lists + 1)):
                if tl.load(block_indices_ptr + entry) == first_key // BLOCK_MASK_K:
                    if block_patterns_ptr is not None:
                        number = tl.load(block_partial_ptr + entry).to(tl.int64)
                        pattern = block_patterns_ptr + number * (BLOCK_MASK_Q * BLOCK_MASK_K)
                        pattern += i % BLOCK_MASK_Q * BLOCK_MASK_K
                        kept = tl.load(pattern + j % BLOCK_MASK_K) != 0
                    else:
                        kept = (i >= 0) & (j >= 0)
            scores = tl.where(kept, scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        v = load_tile(v_base, columns * vs, exists, HEAD_DIM_V, BLOCK_DV)
        seen = there & (lse < float("inf"))  # of other rows no gradient is taken, whatever arrives
        dout = load_tile(dout_base, rows * ds_, seen, HEAD_DIM_V, BLOCK_DV)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        if seed_ptr is not None:
            plane = batch * heads + head
            keep = keep_tile(
                tl.load(seed_ptr), plane, i, first_key, threshold, BLOCK_N, False
            )  # fmt: skip
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        acc += p * (dp - delta[:, None])

    target = dbias_ptr + own_batch.to(tl.int64) * stride_gb + own_head.to(tl.int64) * stride_gh
    if ONE_ROW:
        place = first_key + columns
        tl.store(target + place, tl.sum(acc, 0), mask=place < longest_k)
    else:
        i = (first_tile * BLOCK_M + rows)[:, None]
        target += i.to(tl.int64) * stride_gs
        tl.store(target + j, acc, mask=(i < longest_q) & (j < longest_k))


def bias_gradient(
    x: launching.Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    extras: Extras,
    settings: Settings,
) -> torch.Tensor:
    """The gradient of the bias, in its shape and dtype; x.strides are those of q, k, v and dout."""
    bias = extras.bias
    assert bias is not None
    one_row = bias.shape[2] == 1
    batches = x.batch if one_row else bias.shape[0]
    heads = x.heads if one_row else bias.shape[1]
    rows = 1 if one_row else x.longest_q
    dbias = bias.new_empty((batches, heads, rows, x.longest_k), dtype=torch.float32)
    tile = tiles.tile(
        tiles.BIAS, launch.architecture(x.device), x.element_size,
        max(x.head_dim, x.head_dim_v), tiles.masking(extras, settings),
    ).within(settings.block_q, settings.block_k)  # fmt: skip
    tiles_m = triton.cdiv(x.longest_q, tile.block_m)
    tiles_n = triton.cdiv(x.longest_k, tile.block_n)
    mask, _, slopes, _, *rest = launching.feature_pointers(extras)
    launch.launch(
        _bias_kernel,
        (tiles_n * (1 if one_row else tiles_m) * batches * heads,),
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dbias,
        mask,
        bias,
        slopes,
        *rest,
        *launching.block_pointers(extras, transposed=False),
        *launching.sequence_pointers(extras),
        extras.dropout_seed,
        *x.strides[:12],
        *launching.lse_strides(x),
        *dbias.stride()[:3],
        *launching.feature_strides(x, extras),
        *launching.block_strides(extras, transposed=False),
        x.heads,
        x.heads // x.kv_heads,
        x.seqlen_q,
        x.seqlen_k,
        tiles_m,
        tiles_n,
        x.longest_q,
        x.longest_k,
        x.batch // max(1, batches),
        x.heads // heads,
        *launching.band(settings),
        launching.scale(settings),
        launching.softcap(settings),
        dropout.threshold(settings.dropout_p),
        1.0 / (1.0 - settings.dropout_p),
        **x.widths(),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_MASK_Q=settings.block_q,
        BLOCK_MASK_K=settings.block_k,
        ONE_ROW=one_row,
        TOP_LEFT=settings.top_left,
        PRECISION=settings.fp32_precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dbias.sum_to_size(bias.shape).to(bias.dtype)
