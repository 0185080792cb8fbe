"""Gradients of keys and values: one program per (key tile, key head, batch), over its queries.

    for each query tile:  p = 2^(s - lse),  s of (BLOCK_N, BLOCK_M): keys by queries
                          dV += (D p)^T dO
                          dS = p * (D dO v^T - delta)
                          dK += dX^T q,  dX = dS * (1 - tanh^2)
    dK *= softmax_scale

D is 0 or 1 / (1 - dropout_p) where dropout drops or keeps a weight; backward.py derives the rest. A
program takes the query heads of its key head one after the other. Query tiles that see all keys of
the tile carry no arithmetic of positions (forward.py has a figure). Tiles: `tiles.KEYS`.
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
    of_keys,
    row_state,
    score_tile,
)
from fastattn.ops.attention.triton.sequences import bound, gap, held, query_range, sequence
from fastattn.ops.common import launch
from fastattn.ops.common.triton.dropout import Dropout, keep_tile


class Keys(NamedTuple):
    """A tile of keys, and what it takes to go along the queries of one head."""

    k: Any  # (BLOCK_N, BLOCK_D)
    v: Any  # (BLOCK_N, BLOCK_DV)
    j: Any  # (BLOCK_N, 1) positions
    first_key: Any
    rule: Rule
    q: Strip  # from query 0 on, as those below
    dout: Strip
    lse_ptr: Any
    delta_ptr: Any
    line: Any  # offset of query 0 in lse and delta
    length_q: Any
    mask: Any  # Lane or None
    bias: Any
    q_documents: Any  # pointer to that of query 0
    blocks: Any  # Blocks, transposed, or None
    pattern_columns: Any  # (BLOCK_N, 1) columns inside a tile of the block mask
    dropout: Any  # Dropout or None


@triton.jit
def _accumulate(
    dk,  # (BLOCK_N, BLOCK_D)
    dv,  # (BLOCK_N, BLOCK_DV)
    start,  # queries from start to end; with blocks: places in lists, times their subtiles
    end,
    x,  # Keys
    sizes: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Add query tiles to dk and dv of one key tile."""
    HIDES: tl.constexpr = (
        BOUNDARY
        or x.blocks is not None
        or x.mask is not None
        or x.bias is not None
        or x.q_documents is not None
    )
    rows = tl.arange(0, sizes.BLOCK_M)
    step: tl.constexpr = sizes.BLOCK_M if x.blocks is None else 1
    for t in range(start, end, step):
        m = t
        pattern = None
        if x.blocks is not None:
            m, inner, entry = kept_tile(x.blocks, t, sizes.BLOCK_M)
            if x.blocks.patterns_ptr is not None:
                pattern = pattern_of(x.blocks, entry)
                pattern += (inner + rows)[None, :] * x.blocks.OWN
        inside = rows < x.length_q - m
        i = (m + rows)[None, :]
        q = load_rows(x.q, m, rows, inside, sizes.HEAD_DIM, sizes.BLOCK_D)
        lse, delta = row_state(x.lse_ptr, x.delta_ptr, x.line + m, rows, x.length_q - m)
        q_documents = None
        if x.q_documents is not None:
            q_documents = tl.load(x.q_documents + m + rows, mask=inside, other=0)[None, :]
        tile = Tile(
            inside=inside[None, :],
            q_documents=q_documents,
            mask=x.mask,
            bias=x.bias,
            first=m,
            local=rows[None, :],
            pattern=pattern,
            pattern_columns=x.pattern_columns,
        )
        # Keys by queries: p and ds are then left operands as they come, without a transposition.
        products = tl.dot(x.k, q.T, input_precision=sizes.PRECISION)
        scores, slope_of_cap = score_tile(products, i, x.j, tile, x.rule, BOUNDARY, True)
        p = tl.exp2(scores - lse[None, :])
        if HIDES:  # a row that sees no key: whatever gradient arrives, p = 0 takes none of it
            inside = inside & (lse < float("inf"))
        dout = load_rows(x.dout, m, rows, inside, sizes.HEAD_DIM_V, sizes.BLOCK_DV)
        dp = tl.dot(x.v, dout.T, input_precision=sizes.PRECISION)
        if x.dropout is not None:
            keep = keep_tile(x.dropout, i, x.first_key, sizes.BLOCK_N, True)
            dp = tl.where(keep, dp * x.dropout.inverse_keep, 0.0)
            kept = tl.where(keep, p * x.dropout.inverse_keep, 0.0)
        else:
            kept = p
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=sizes.PRECISION)
        ds = p * (dp - delta[None, :])
        if x.rule.softcap is not None:
            ds *= slope_of_cap
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=sizes.PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=launching.SIZES)
def _keys_kernel(
    q_ptr, k_ptr, v_ptr,  # as of the forward kernel, like all that is not explained
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v)
    lse_ptr, delta_ptr,  # (batch, heads, seqlen_q), contiguous; packed: (heads, total_q)
    dk_ptr, dv_ptr,  # as k and v, contiguous
    ranges_ptr,  # (batch, tiles_n, 2): queries that the documents leave
    mask_ptr, bias_ptr, slopes_ptr, key_lengths_ptr, q_documents_ptr, k_documents_ptr,
    block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,  # transposed
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, but those of lse
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh,
    stride_lb, stride_lh,
    stride_gb, stride_gs, stride_gh,  # of dk
    stride_ob, stride_os, stride_oh,  # of dv
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq, stride_mk,
    stride_bb: tl.int64, stride_bh: tl.int64, stride_bq, stride_bk,
    stride_slope, stride_qd, stride_kd, stride_block_b, stride_block_h,
    kv_heads, group_size, seqlen_q, seqlen_k, tiles_n,
    softmax_scale,
    low, high, scale, softcap, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr, BLOCK_MASK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sizes: tl.constexpr = Sizes(
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION
    )
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
        begin, stop = gap(cu_seqlens_k_ptr, batch, sequences, k_start, covered, seqlen_k)
        clear_rows(
            dk_ptr, begin, stop, tile_n, tiles_n, kv_heads, kv_head, BLOCK_N, HEAD_DIM, BLOCK_D
        )
        clear_rows(
            dv_ptr, begin, stop, tile_n, tiles_n, kv_heads, kv_head, BLOCK_N, HEAD_DIM_V, BLOCK_DV
        )
        if first_key >= length_k:
            return
    shift = length_k - length_q
    key_limit = length_k
    if key_lengths_ptr is not None:
        key_limit = held(key_lengths_ptr, batch, key_limit, 0)
    lowest = None if low is None else bound(low, shift, TOP_LEFT)
    highest = None if high is None else bound(high, shift, TOP_LEFT)

    columns = tl.arange(0, BLOCK_N)
    inside = columns < key_limit - first_key
    token = k_start + first_key
    of_k = strip(Rows(k_ptr, stride_kb, stride_ks, stride_kh), batch, kv_head, token, ALIGN)
    of_v = strip(Rows(v_ptr, stride_vb, stride_vs, stride_vh), batch, kv_head, token, ALIGN)
    k = load_rows(of_k, 0, columns, inside, HEAD_DIM, BLOCK_D)
    v = load_rows(of_v, 0, columns, inside, HEAD_DIM_V, BLOCK_DV)
    j = (first_key + columns)[:, None]
    k_documents = None
    if k_documents_ptr is not None:
        k_documents = k_documents_ptr + batch * stride_kd + k_start

    # Rows of padding keys are garbage that no other row sees; they are zeroed at the end.
    begin = 0
    end = length_q
    if ranges_ptr is not None:
        pair = ranges_ptr + (batch * tiles_n + tile_n) * 2
        begin = tl.load(pair)
        end = tl.minimum(end, tl.load(pair + 1))
    start, whole_start, whole_end, end = query_range(
        first_key, key_limit, begin, end, lowest, highest, BLOCK_M, BLOCK_N
    )
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    blocks = None
    pattern_columns = None
    if block_offsets_ptr is not None:
        pattern_columns = j % BLOCK_MASK_K
        blocks = Blocks(
            block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
            stride_block_b, stride_block_h, BLOCK_MASK_K, BLOCK_MASK_Q,
        )  # fmt: skip
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for g in range(group_size):
        head = kv_head * group_size + g
        heads = kv_heads * group_size
        mask = None
        if mask_ptr is not None:
            plane = Plane(mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk)
            mask = of_keys(plane, batch, head, first_key, columns[:, None])
        bias = None
        if bias_ptr is not None:
            plane = Plane(bias_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
            bias = of_keys(plane, batch, head, first_key, columns[:, None])
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * stride_slope + head) * LOG2_E
        q_documents = None
        if q_documents_ptr is not None:
            q_documents = q_documents_ptr + batch * stride_qd + q_start
        dropout = None
        if seed_ptr is not None:
            dropout = Dropout(seed, batch * heads + head, threshold, inverse_keep)
        rule = Rule(
            scale=scale,
            softcap=softcap,
            slope=slope,
            shift=shift,
            low=lowest,
            high=highest,
            key_limit=key_limit,
            k_documents=k_documents,
        )
        x = Keys(
            k=k,
            v=v,
            j=j,
            first_key=first_key,
            rule=rule,
            q=strip(Rows(q_ptr, stride_qb, stride_qs, stride_qh), batch, head, q_start, ALIGN),
            dout=strip(
                Rows(dout_ptr, stride_db, stride_ds, stride_dh), batch, head, q_start, ALIGN
            ),
            lse_ptr=lse_ptr,
            delta_ptr=delta_ptr,
            line=batch * stride_lb + head * stride_lh + q_start,
            length_q=length_q,
            mask=mask,
            bias=bias,
            q_documents=q_documents,
            blocks=blocks,
            pattern_columns=pattern_columns,
            dropout=dropout,
        )
        if blocks is not None:
            first, last = kept_range(blocks, batch, head, first_key, BLOCK_M)
            dk, dv = _accumulate(dk, dv, first, last, x, sizes, True)
        else:
            if high is not None:
                dk, dv = _accumulate(dk, dv, start, whole_start, x, sizes, True)
            dk, dv = _accumulate(dk, dv, whole_start, whole_end, x, sizes, False)
            if low is not None:
                dk, dv = _accumulate(dk, dv, whole_end, end, x, sizes, True)

    dk = tl.where(inside[:, None], dk * softmax_scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    exists = columns < length_k - first_key
    of_dk = strip(Rows(dk_ptr, stride_gb, stride_gs, stride_gh), batch, kv_head, token, ALIGN)
    of_dv = strip(Rows(dv_ptr, stride_ob, stride_os, stride_oh), batch, kv_head, token, ALIGN)
    store_tile(of_dk.base, dk, columns * of_dk.stride, exists, HEAD_DIM, BLOCK_D)
    store_tile(of_dv.base, dv, columns * of_dv.stride, exists, HEAD_DIM_V, BLOCK_DV)


def prepared(
    x: launching.Layout, extras: Extras, settings: Settings
) -> tuple[launch.Prepared, int, int]:
    """The launch, the keys of a tile, and tiles of the longest sequence."""
    tile = launching.tile(tiles.KEYS, x, extras, settings)
    tiles_n = triton.cdiv(x.longest_k, tile.block_n)
    numbers = (
        *x.strides[:12],  # of q, k, v and dout
        *launching.lse_strides(x),
        *launching.result_strides(x, x.kv_heads, x.seqlen_k, x.head_dim),
        *launching.result_strides(x, x.kv_heads, x.seqlen_k, x.head_dim_v),
        *launching.strides(x, extras, transposed=True),
        x.kv_heads,
        x.heads // x.kv_heads,
        x.seqlen_q,
        x.seqlen_k,
        tiles_n,
        launching.in_float32(settings.softmax_scale),
        *launching.arithmetic(settings),
    )
    grid = (tiles_n * x.kv_heads * x.batch,)
    constants = launching.constants(x, settings, tile)
    return launch.Prepared(_keys_kernel, grid, numbers, **constants), tile.block_n, tiles_n
