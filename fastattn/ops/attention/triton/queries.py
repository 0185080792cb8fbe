"""Gradient of the queries: one program per (query tile, head, batch), over its keys.

    for each key tile:  p = 2^(s - lse),  s of (BLOCK_M, BLOCK_N)
                        dS = p * (D dO v^T - delta)
                        dQ += dX k,  dX = dS * (1 - tanh^2)
    dQ *= softmax_scale

D is 0 or 1 / (1 - dropout_p) where dropout drops or keeps a weight; backward.py derives the rest.
With ROW_SUMS the kernel computes rowsum(p * D dO v^T), which is delta, instead of dQ. Key tiles
that every query of the tile sees whole carry no arithmetic of positions (forward.py has a figure).
Tiles: `tiles.QUERIES`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.blocks import Blocks, kept_range, kept_tile, pattern_of
from fastattn.ops.attention.triton.memory import (
    Rows,
    Strip,
    clear_rows,
    load_rows,
    store_tile,
    strip,
)
from fastattn.ops.attention.triton.scores import (
    LOG2_E,
    Plane,
    Rule,
    Sizes,
    Tile,
    of_queries,
    row_state,
    score_tile,
)
from fastattn.ops.attention.triton.sequences import bound, gap, held, key_range, sequence
from fastattn.ops.common import launch
from fastattn.ops.common.triton.dropout import Dropout, keep_tile


class Queries(NamedTuple):
    """A tile of queries, and what it takes to go along the keys."""

    q: Any  # (BLOCK_M, BLOCK_D)
    dout: Any  # (BLOCK_M, BLOCK_DV)
    lse: Any  # (BLOCK_M,)
    delta: Any
    i: Any  # (BLOCK_M, 1) positions
    inside: Any  # (BLOCK_M, 1) rows that exist
    rule: Rule
    k: Strip  # from key 0 on
    v: Strip
    mask: Any  # Lane or None
    bias: Any
    q_documents: Any  # (BLOCK_M, 1)
    blocks: Any  # Blocks or None
    pattern_row: Any  # (BLOCK_M, 1) offsets of rows inside a tile of the block mask
    dropout: Any  # Dropout or None


@triton.jit
def _accumulate(
    dq,  # (BLOCK_M, BLOCK_D)
    start,  # keys from start to end; with blocks: places in lists, times their subtiles
    end,
    x,  # Queries
    sizes: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Add key tiles to dq of one query tile; with ROW_SUMS to rowsum(p * D dO v^T), (BLOCK_M,)."""
    columns = tl.arange(0, sizes.BLOCK_N)
    step: tl.constexpr = sizes.BLOCK_N if x.blocks is None else 1
    for t in range(start, end, step):
        n = t
        pattern = None
        pattern_columns = None
        if x.blocks is not None:
            n, inner, entry = kept_tile(x.blocks, t, sizes.BLOCK_N)
            if x.blocks.patterns_ptr is not None:
                pattern = pattern_of(x.blocks, entry) + x.pattern_row
                pattern_columns = inner + columns[None, :]
        inside = None
        if BOUNDARY:
            inside = columns < x.rule.key_limit - n
        k = load_rows(x.k, n, columns, inside, sizes.HEAD_DIM, sizes.BLOCK_D)
        v = load_rows(x.v, n, columns, inside, sizes.HEAD_DIM_V, sizes.BLOCK_DV)
        tile = Tile(
            inside=x.inside,
            q_documents=x.q_documents,
            mask=x.mask,
            bias=x.bias,
            first=n,
            local=columns[None, :],
            pattern=pattern,
            pattern_columns=pattern_columns,
        )
        products = tl.dot(x.q, k.T, input_precision=sizes.PRECISION)
        j = (n + columns)[None, :]
        scores, slope_of_cap = score_tile(products, x.i, j, tile, x.rule, BOUNDARY, BOUNDARY)
        p = tl.exp2(scores - x.lse[:, None])
        dp = tl.dot(x.dout, v.T, input_precision=sizes.PRECISION)
        if x.dropout is not None:
            keep = keep_tile(x.dropout, x.i, n, sizes.BLOCK_N, False)
            dp = tl.where(keep, dp * x.dropout.inverse_keep, 0.0)
        if ROW_SUMS:
            dq += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - x.delta[:, None])
            if x.rule.softcap is not None:
                ds *= slope_of_cap
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=sizes.PRECISION)
    return dq


@triton.jit(do_not_specialize=launching.SIZES)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr,  # as of the forward kernel, like all that is not explained
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v)
    lse_ptr, delta_ptr,  # (batch, heads, seqlen_q), contiguous; packed: (heads, total_q)
    dq_ptr,  # as q, contiguous; with ROW_SUMS as delta
    ranges_ptr,  # (batch, tiles_m, 2): keys that the documents leave
    mask_ptr, bias_ptr, slopes_ptr, key_lengths_ptr, q_documents_ptr, k_documents_ptr,
    block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, but those of lse
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh,
    stride_gb, stride_gs, stride_gh,  # of dq
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq, stride_mk,
    stride_bb: tl.int64, stride_bh: tl.int64, stride_bq, stride_bk,
    stride_slope, stride_qd, stride_kd, stride_block_b, stride_block_h,
    heads, group_size, seqlen_q, seqlen_k, tiles_m,
    softmax_scale,
    low, high, scale, softcap, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr, BLOCK_MASK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ROW_SUMS: tl.constexpr,
):  # fmt: skip
    sizes: tl.constexpr = Sizes(
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION
    )
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
    of_q = strip(Rows(q_ptr, stride_qb, stride_qs, stride_qh), batch, head, token, ALIGN)
    of_dout = strip(Rows(dout_ptr, stride_db, stride_ds, stride_dh), batch, head, token, ALIGN)
    q = load_rows(of_q, 0, rows, inside, HEAD_DIM, BLOCK_D)
    line = batch * stride_lb + head * stride_lh + token
    lse, delta = row_state(lse_ptr, delta_ptr, line, rows, length_q - first_row)
    seen = lse < float("inf")  # of rows that see no key no gradient is taken, whatever arrives
    dout = load_rows(of_dout, 0, rows, inside & seen, HEAD_DIM_V, BLOCK_DV)

    i = (first_row + rows)[:, None]
    mask = None
    if mask_ptr is not None:
        plane = Plane(mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk)
        mask = of_queries(plane, batch, head, first_row, rows[:, None])
    bias = None
    if bias_ptr is not None:
        plane = Plane(bias_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
        bias = of_queries(plane, batch, head, first_row, rows[:, None])
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * stride_slope + head) * LOG2_E
    q_documents = None
    k_documents = None
    if q_documents_ptr is not None:
        ids = q_documents_ptr + batch * stride_qd + token + rows
        q_documents = tl.load(ids, mask=inside, other=0)[:, None]
        k_documents = k_documents_ptr + batch * stride_kd + k_start
    blocks = None
    pattern_row = None
    if block_offsets_ptr is not None:
        pattern_row = i % BLOCK_MASK_Q * BLOCK_MASK_K
        blocks = Blocks(
            block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
            stride_block_b, stride_block_h, BLOCK_MASK_Q, BLOCK_MASK_K,
        )  # fmt: skip
    dropout = None
    if seed_ptr is not None:
        dropout = Dropout(tl.load(seed_ptr), batch * heads + head, threshold, inverse_keep)
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
    x = Queries(
        q=q,
        dout=dout,
        lse=lse,
        delta=delta,
        i=i,
        inside=inside[:, None],
        rule=rule,
        k=strip(Rows(k_ptr, stride_kb, stride_ks, stride_kh), batch, kv_head, k_start, ALIGN),
        v=strip(Rows(v_ptr, stride_vb, stride_vs, stride_vh), batch, kv_head, k_start, ALIGN),
        mask=mask,
        bias=bias,
        q_documents=q_documents,
        blocks=blocks,
        pattern_row=pattern_row,
        dropout=dropout,
    )

    if ROW_SUMS:
        dq = tl.zeros((BLOCK_M,), tl.float32)
    else:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if blocks is not None:
        start, end = kept_range(blocks, batch, head, first_row, BLOCK_N)
        dq = _accumulate(dq, start, end, x, sizes, ROW_SUMS, True)
    else:
        begin = 0
        end = key_limit
        if ranges_ptr is not None:
            pair = ranges_ptr + (batch * tiles_m + tile_m) * 2
            begin = tl.load(pair)
            end = tl.minimum(end, tl.load(pair + 1))
        last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
        start, whole_start, whole_end, end = key_range(
            first_row, last_row, begin, end, rule.low, rule.high, BLOCK_N, low is not None
        )
        if low is not None:
            dq = _accumulate(dq, start, whole_start, x, sizes, ROW_SUMS, True)
        dq = _accumulate(dq, whole_start, whole_end, x, sizes, ROW_SUMS, False)
        dq = _accumulate(dq, whole_end, end, x, sizes, ROW_SUMS, True)
    if ROW_SUMS:
        tl.store(dq_ptr + line + rows, dq, mask=inside)
    else:
        of_dq = strip(Rows(dq_ptr, stride_gb, stride_gs, stride_gh), batch, head, token, ALIGN)
        dq *= softmax_scale
        store_tile(of_dq.base, dq, rows * of_dq.stride, inside, HEAD_DIM, BLOCK_D)


def prepared(
    x: launching.Layout, extras: Extras, settings: Settings, *, row_sums: bool
) -> tuple[launch.Prepared, int, int]:
    """The launch, the queries of a tile, and tiles of the longest sequence."""
    tile = launching.tile(tiles.QUERIES, x, extras, settings)
    tiles_m = triton.cdiv(x.longest_q, tile.block_m)
    numbers = (
        *x.strides[:12],  # of q, k, v and dout
        *launching.lse_strides(x),
        *launching.result_strides(x, x.heads, x.seqlen_q, x.head_dim),
        *launching.strides(x, extras, transposed=False),
        x.heads,
        x.heads // x.kv_heads,
        x.seqlen_q,
        x.seqlen_k,
        tiles_m,
        launching.in_float32(settings.softmax_scale),
        *launching.arithmetic(settings),
    )
    grid = (tiles_m * x.heads * x.batch,)
    constants = launching.constants(x, settings, tile)
    run = launch.Prepared(_queries_kernel, grid, numbers, **constants, ROW_SUMS=row_sums)
    return run, tile.block_m, tiles_m
