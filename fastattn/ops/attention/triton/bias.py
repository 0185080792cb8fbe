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

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.blocks import Blocks, kept_range, pattern_of
from fastattn.ops.attention.triton.memory import Rows, load_rows, strip
from fastattn.ops.attention.triton.scores import (
    LOG2_E,
    Plane,
    Rule,
    Tile,
    of_queries,
    row_state,
    score_tile,
)
from fastattn.ops.attention.triton.sequences import bound, held, sequence
from fastattn.ops.common import launch
from fastattn.ops.common.triton.dropout import Dropout, keep_tile


@triton.jit(do_not_specialize=[*launching.SIZES, "shared_batches", "shared_heads"])
def _bias_kernel(
    q_ptr, k_ptr, v_ptr,  # as of the forward kernel, like all that is not explained
    dout_ptr, lse_ptr, delta_ptr,
    dbias_ptr,  # (batch | 1, heads | 1, seqlen_q | 1, seqlen_k), contiguous, float32
    mask_ptr, bias_ptr, slopes_ptr, key_lengths_ptr, q_documents_ptr, k_documents_ptr,
    block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, like those of k, v and dout
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gs,  # of dbias: batch, head, query
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq, stride_mk,
    stride_bb: tl.int64, stride_bh: tl.int64, stride_bq, stride_bk,
    stride_slope, stride_qd, stride_kd, stride_block_b, stride_block_h,
    heads, group_size, seqlen_q, seqlen_k, tiles_m,
    tiles_n, longest_q, longest_k,
    shared_batches, shared_heads,  # batches and heads that one program adds up
    low, high, scale, softcap, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr, BLOCK_MASK_K: tl.constexpr,
    ONE_ROW: tl.constexpr,  # the bias has one row for all queries
    TOP_LEFT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
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
        kv_head = head // group_size
        first_row = tile_m * BLOCK_M
        q_start, length_q = sequence(cu_seqlens_q_ptr, seqused_q_ptr, batch, seqlen_q)
        k_start, length_k = sequence(cu_seqlens_k_ptr, seqused_k_ptr, batch, seqlen_k)
        shift = length_k - length_q
        key_limit = length_k
        if key_lengths_ptr is not None:
            key_limit = held(key_lengths_ptr, batch, key_limit, 0)
        i = (first_row + rows)[:, None]
        inside = rows < length_q - first_row
        q_token = q_start + first_row
        k_token = k_start + first_key
        line = batch * stride_lb + head * stride_lh + q_token
        lse, delta = row_state(lse_ptr, delta_ptr, line, rows, length_q - first_row)
        of_q = strip(Rows(q_ptr, stride_qb, stride_qs, stride_qh), batch, head, q_token, ALIGN)
        of_k = strip(Rows(k_ptr, stride_kb, stride_ks, stride_kh), batch, kv_head, k_token, ALIGN)
        of_v = strip(Rows(v_ptr, stride_vb, stride_vs, stride_vh), batch, kv_head, k_token, ALIGN)
        of_dout = strip(
            Rows(dout_ptr, stride_db, stride_ds, stride_dh), batch, head, q_token, ALIGN
        )
        exists = columns < key_limit - first_key
        q = load_rows(of_q, 0, rows, inside, HEAD_DIM, BLOCK_D)
        k = load_rows(of_k, 0, columns, exists, HEAD_DIM, BLOCK_D)
        mask = None
        if mask_ptr is not None:
            plane = Plane(mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk)
            mask = of_queries(plane, batch, head, first_row, rows[:, None])
        plane = Plane(bias_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
        bias = of_queries(plane, batch, head, first_row, rows[:, None])
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * stride_slope + head) * LOG2_E
        q_documents = None
        k_documents = None
        if q_documents_ptr is not None:
            ids = q_documents_ptr + batch * stride_qd + q_token + rows
            q_documents = tl.load(ids, mask=inside, other=0)[:, None]
            k_documents = k_documents_ptr + batch * stride_kd + k_start
        rule = Rule(
            scale=scale,
            softcap=softcap,
            slope=slope,
            shift=shift,
            low=None if low is None else bound(low, shift, TOP_LEFT),
            high=None if high is None else bound(high, shift, TOP_LEFT),
            key_limit=key_limit,
            k_documents=k_documents,
        )
        tile = Tile(
            inside=inside[:, None],
            q_documents=q_documents,
            mask=mask,
            bias=bias,
            first=first_key,
            local=columns[None, :],
        )
        products = tl.dot(q, k.T, input_precision=PRECISION)
        scores, _ = score_tile(products, i, j, tile, rule, True, True)
        if block_offsets_ptr is not None:
            blocks = Blocks(
                block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
                stride_block_b, stride_block_h, BLOCK_MASK_Q, BLOCK_MASK_K,
            )  # fmt: skip
            # Whether the tile is kept, by a search of its row's list; what hides it is p = 0.
            start, end = kept_range(blocks, batch, head, first_row, BLOCK_MASK_K)
            kept = (i < 0) & (j < 0)
            for entry in range(start, end):
                if tl.load(block_indices_ptr + entry) == first_key // BLOCK_MASK_K:
                    if block_patterns_ptr is not None:
                        pattern = pattern_of(blocks, entry)
                        pattern += i % BLOCK_MASK_Q * BLOCK_MASK_K
                        kept = tl.load(pattern + j % BLOCK_MASK_K) != 0
                    else:
                        kept = (i >= 0) & (j >= 0)
            scores = tl.where(kept, scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        v = load_rows(of_v, 0, columns, exists, HEAD_DIM_V, BLOCK_DV)
        seen = inside & (lse < float("inf"))  # of other rows no gradient is taken, whatever arrives
        dout = load_rows(of_dout, 0, rows, seen, HEAD_DIM_V, BLOCK_DV)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        if seed_ptr is not None:
            dropout = Dropout(tl.load(seed_ptr), batch * heads + head, threshold, inverse_keep)
            dp = tl.where(keep_tile(dropout, i, first_key, BLOCK_N, False), dp * inverse_keep, 0.0)
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
    tile = launching.tile(tiles.BIAS, x, extras, settings)
    tiles_m = triton.cdiv(x.longest_q, tile.block_m)
    tiles_n = triton.cdiv(x.longest_k, tile.block_n)
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
        *launching.pointers(extras, transposed=False),
        *x.strides[:12],
        *launching.lse_strides(x),
        *dbias.stride()[:3],
        *launching.strides(x, extras, transposed=False),
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
        *launching.arithmetic(settings),
        **launching.constants(x, settings, tile),
        ONE_ROW=one_row,
    )
    return dbias.sum_to_size(bias.shape).to(bias.dtype)
