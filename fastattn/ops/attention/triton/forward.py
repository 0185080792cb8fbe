"""Attention forward: one program per (query tile, head, batch), and per part of the keys if split.

    for each key tile:  s = log2(e) (softmax_scale q k^T, capped, biased, hidden: scores.py)
                        m' = max(m, rowmax s);  p = 2^(s - m')
                        l = l 2^(m - m') + rowsum p;  acc = acc 2^(m - m') + dropout(p) v
    out = acc / l,  lse = (m + log2 l) ln 2

(Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691.) A sink is a first score
without a value: m starts as the sink, l as 1. Key tiles that every row of the query tile sees whole
carry no arithmetic of positions; the tiles that the band's edges or the key limit cross do. For
4 x 4 tiles of a causal window, `.` without that arithmetic, `/` with it, `-` not visited:

    / - - -
    . / - -
    / . / -
    - / . /

A few queries (decoding) would leave most of a GPU idle: then the query heads that share a key head
are rows of one tile, and the keys of each sequence are cut into parts, whose results `merge.py`
joins. There are as many programs as keep the GPU busy; they take the parts in turns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import dropout, tiles
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.documents import tile_ranges
from fastattn.ops.attention.triton.merge import merge
from fastattn.ops.attention.triton.rotary import rotated
from fastattn.ops.attention.triton.scores import (
    LN_2,
    LOG2_E,
    clear_rows,
    exact_beyond,
    gap,
    held,
    keep_tile,
    key_range,
    load_tile,
    part_length,
    parts_of,
    score_tile,
    sequence,
    store_tile,
)
from fastattn.ops.common import launch
from fastattn.ops.common.plans import PlanCache

SEQUENCES = tl.constexpr(128)  # that a program looks at at once to find its parts


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_DV)
    total,  # (BLOCK_M,) l
    top,  # (BLOCK_M,) m
    q,  # (BLOCK_M, BLOCK_D)
    k_base,  # at key 0
    v_base,
    block_table_ptr,  # row of the sequence, or None
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
    first_key,
    mask_base,  # at the tile's first row and key 0
    mask_rows,  # (BLOCK_M, 1) offsets from there
    bias_base,
    bias_rows,
    slope,
    q_documents,
    k_documents_ptr,
    pattern_row,  # (BLOCK_M, 1) rows inside a tile of the block mask, times its width
    seed,
    plane,
    threshold,
    scale,
    softcap,
    strides,  # (k, v, mask, bias) from key to key, (k, v) from page to page; k, v in units of ALIGN
    page_size,
    pages,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr,
    BLOCK_MASK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_POSITIVE: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Fold key tiles into the running softmax."""
    stride_k, stride_v, stride_mask, stride_bias, stride_k_page, stride_v_page = strides
    local = tl.arange(0, BLOCK_N)
    power = tl.exp2(tl.ceil(tl.log2(scale))) if SCALE_POSITIVE else scale
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
            if patterns_ptr is not None:  # pattern 0 is all true, for tiles that are seen whole
                number = tl.load(partial_ptr + entry).to(tl.int64)
                pattern_rows = patterns_ptr + number * (BLOCK_MASK_Q * BLOCK_MASK_K) + pattern_row
                pattern_columns = inner + local[None, :]
        j = n + local
        inside = None
        if BOUNDARY:
            inside = j < key_limit
            if first_key is not None:
                inside = inside & (j >= first_key)
        if block_table_ptr is not None:
            page = tl.load(block_table_ptr + j // page_size, mask=j < key_limit, other=0)
            page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
            slot = (j % page_size).to(tl.int64)
            k_tile = k_base
            v_tile = v_base
            # Both products are of 32-bit numbers, to 64 bits: one instruction each.
            k_offsets = (page * stride_k_page.to(tl.int64) + slot * stride_k) * ALIGN
            v_offsets = (page * stride_v_page.to(tl.int64) + slot * stride_v) * ALIGN
        else:
            first = tl.cast(n, tl.int64)
            k_tile = k_base + first * (stride_k * ALIGN)
            v_tile = v_base + first * (stride_v * ALIGN)
            k_offsets = local * (stride_k * ALIGN)
            v_offsets = local * (stride_v * ALIGN)
        mask_corner = None
        if mask_base is not None:
            mask_corner = mask_base + tl.cast(n, tl.int64) * stride_mask
        bias_corner = None
        if bias_base is not None:
            bias_corner = bias_base + tl.cast(n, tl.int64) * stride_bias
        k = load_tile(k_tile, k_offsets, inside, HEAD_DIM, BLOCK_D)
        # Where scores are nothing but scaled products, the maximum is taken before scaling, which
        # then costs nothing: it is one instruction with the subtraction of the maximum.
        SCALED_LAST: tl.constexpr = (
            SCALE_POSITIVE and softcap is None and slope is None and bias_base is None
        )
        unit = None if SCALED_LAST else scale
        scores, _ = score_tile(
            tl.dot(q, k.T, input_precision=PRECISION), i, j[None, :], rows_inside, key_limit, low,
            high, shift, first_key, mask_corner, mask_rows, local[None, :] * stride_mask,
            bias_corner, bias_rows, local[None, :] * stride_bias, slope, q_documents,
            k_documents_ptr, pattern_rows, pattern_columns, unit, softcap, BOUNDARY, BOUNDARY,
        )  # fmt: skip
        highest = tl.max(scores, 1)
        unscaled = highest
        if SCALED_LAST:
            highest *= scale
        new_top = tl.maximum(top, highest)
        # A row that has seen no key yet has the maximum -inf; -inf - -inf would be NaN.
        harmless = tl.where(new_top == float("-inf"), 0.0, new_top)
        if SCALED_LAST:
            row_scale, row_top = exact_beyond(unscaled, highest, harmless, scale, power)
            p = tl.exp2(scores * row_scale[:, None] - row_top[:, None])
        else:
            p = tl.exp2(scores - harmless[:, None])
        alpha = tl.exp2(top - harmless)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if seed is not None:
            keep = keep_tile(seed, plane, i, n, threshold, BLOCK_N, False)
            p = tl.where(keep, p, 0.0)
        v = load_tile(v_tile, v_offsets, inside, HEAD_DIM_V, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=launching.SIZES)
def _forward_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim); packed: batch 1
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim); paged: (pages, page_size, ...)
    v_ptr,
    out_ptr,  # (batch, seqlen_q, heads, head_dim_v), contiguous
    lse_ptr,  # (batch, heads, seqlen_q), contiguous; packed: (heads, total_q)
    part_out_ptr,  # (splits, *out.shape), float32, contiguous, if SPLIT
    part_lse_ptr,  # (splits, *lse.shape)
    mask_ptr,  # uint8
    bias_ptr,
    slopes_ptr,
    sink_ptr,
    key_lengths_ptr,  # (batch,) without seqlen_new
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
    block_table_ptr,  # (batch, pages of a sequence)
    cache_indices_ptr,  # (batch,)
    cache_starts_ptr,  # (batch,)
    rotary_cos_ptr,
    rotary_sin_ptr,
    stride_qb, stride_qs, stride_qh,  # in units of ALIGN elements, like those of k, v and out
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_lb, stride_lh,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mq, stride_mk,
    stride_bb: tl.int64, stride_bh: tl.int64, stride_bq, stride_bk,
    stride_slope,  # from batch to batch
    stride_qd, stride_kd,  # of the documents, from batch to batch
    stride_block_b, stride_block_h,  # of block_offsets
    stride_table,
    part_out_stride: tl.int64,  # from split to split, in units of ALIGN
    part_lse_stride: tl.int64,
    heads,
    group_size,
    seqlen_q,  # packed: total_q
    seqlen_k,
    tiles_m,
    batch_size,
    splits,  # parts that a sequence has at most
    split_length,  # keys of a part, at least; a multiple of BLOCK_N
    page_size,
    pages,  # or sequences of a padded cache
    seqlen_new,  # keys that the call appended to the cache
    rotary_half,
    rotary_positions,
    low,  # -left; None for no bound
    high,  # right; None for no bound
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
    PACK: tl.constexpr,  # query heads that are rows of one tile
    SPLIT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    LENGTH_DIAGONAL: tl.constexpr,  # the diagonal follows key_lengths, as of a cache
    ROTARY_INTERLEAVED: tl.constexpr,
    ROTARY_ADVANCES: tl.constexpr,  # query i stands i after the first, else all at one position
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_POSITIVE: tl.constexpr,
):  # fmt: skip
    # One grid axis, for batch * heads may pass 65535. Neighbours share a head, so its keys stay in
    # the L2; under a causal mask the longest rows of tiles start first.
    head_tiles = heads // PACK
    call = (
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, mask_ptr, bias_ptr,
        slopes_ptr, sink_ptr, key_lengths_ptr, q_documents_ptr, k_documents_ptr, ranges_ptr,
        block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr, seed_ptr, block_table_ptr,
        cache_indices_ptr, cache_starts_ptr, rotary_cos_ptr, rotary_sin_ptr, stride_qb, stride_qs,
        stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob,
        stride_os, stride_oh, stride_lb, stride_lh, stride_mb, stride_mh, stride_mq, stride_mk,
        stride_bb, stride_bh, stride_bq, stride_bk, stride_slope, stride_qd, stride_kd,
        stride_block_b, stride_block_h, stride_table, part_out_stride, part_lse_stride, heads,
        group_size, seqlen_q, seqlen_k, tiles_m, splits, split_length, page_size, pages, seqlen_new,
        rotary_half, rotary_positions, low, high, scale, softcap, threshold, inverse_keep,
    )  # fmt: skip
    if SPLIT:
        # Programs take the parts that the sequences have in turns. Key heads are neighbours: they
        # share their pages of DRAM.
        tiles_of_part = tiles_m * head_tiles
        parts = _find_part(
            key_lengths_ptr, 0, batch_size, seqlen_k, seqlen_new, splits, split_length
        )[2]
        first = tl.program_id(0).to(tl.int64)
        # What could be computed before the loop would hold a hundred registers in it.
        for item in tl.range(first, parts * tiles_of_part, tl.num_programs(0), disable_licm=True):
            batch, split, _ = _find_part(
                key_lengths_ptr, item // tiles_of_part, batch_size, seqlen_k, seqlen_new, splits,
                split_length,
            )  # fmt: skip
            tile = (item % tiles_of_part).to(tl.int32)
            _attend_rows(
                batch, tile // tiles_m * PACK, tile % tiles_m, split, call,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_MASK_Q,
                BLOCK_MASK_K, PACK, SPLIT, TOP_LEFT, LENGTH_DIAGONAL, ROTARY_INTERLEAVED,
                ROTARY_ADVANCES, ALIGN, PRECISION, SCALE_POSITIVE,
            )  # fmt: skip
    else:
        program = tl.program_id(0)
        tile_m = program % tiles_m
        if high is not None:
            tile_m = tiles_m - 1 - tile_m
        head = program // tiles_m % head_tiles * PACK
        _attend_rows(
            program // tiles_m // head_tiles, head, tile_m, 0, call,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_MASK_Q, BLOCK_MASK_K,
            PACK, SPLIT, TOP_LEFT, LENGTH_DIAGONAL, ROTARY_INTERLEAVED, ROTARY_ADVANCES, ALIGN,
            PRECISION, SCALE_POSITIVE,
        )  # fmt: skip


@triton.jit
def _find_part(lengths_ptr, number, batch_size, seqlen_k, seqlen_new, splits, split_length):
    """(sequence, its part) of part `number` of the batch, and how many it has; in 64 bits."""
    if lengths_ptr is None:
        each = parts_of(seqlen_k, splits, split_length)
        found = tl.cast(number, tl.int64) // each
        part = (number - found * each).to(tl.int32)
        total = tl.cast(batch_size, tl.int64) * each
    else:
        found = tl.cast(0, tl.int64)
        before = tl.cast(0, tl.int64)  # parts of the sequences before this one
        total = tl.cast(0, tl.int64)
        for first in range(0, batch_size, SEQUENCES):
            b = first + tl.arange(0, SEQUENCES)
            keys = held(lengths_ptr, tl.minimum(b, batch_size - 1), seqlen_k, seqlen_new)
            parts = parts_of(keys, splits, split_length)
            parts = tl.where(b < batch_size, parts, 0).to(tl.int64)
            passed = (b < batch_size) & (total + tl.cumsum(parts, 0) <= number)
            found += tl.sum(passed.to(tl.int64), 0)
            before += tl.sum(tl.where(passed, parts, 0), 0)
            total += tl.sum(parts, 0)
        part = (number - before).to(tl.int32)
    return found, part, total


@triton.jit
def _attend_rows(
    batch,
    head,  # the first one of the tile
    tile_m,
    split,  # the part of the keys, 0 if not SPLIT
    call,  # the kernel's arguments but for batch_size
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr,
    BLOCK_MASK_K: tl.constexpr,
    PACK: tl.constexpr,
    SPLIT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    LENGTH_DIAGONAL: tl.constexpr,
    ROTARY_INTERLEAVED: tl.constexpr,
    ROTARY_ADVANCES: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_POSITIVE: tl.constexpr,
):
    """The results of one tile of queries, for one part of the keys if SPLIT."""
    (
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, mask_ptr, bias_ptr,
        slopes_ptr, sink_ptr, key_lengths_ptr, q_documents_ptr, k_documents_ptr, ranges_ptr,
        block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr, seed_ptr, block_table_ptr,
        cache_indices_ptr, cache_starts_ptr, rotary_cos_ptr, rotary_sin_ptr, stride_qb, stride_qs,
        stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob,
        stride_os, stride_oh, stride_lb, stride_lh, stride_mb, stride_mh, stride_mq, stride_mk,
        stride_bb, stride_bh, stride_bq, stride_bk, stride_slope, stride_qd, stride_kd,
        stride_block_b, stride_block_h, stride_table, part_out_stride, part_lse_stride, heads,
        group_size, seqlen_q, seqlen_k, tiles_m, splits, split_length, page_size, pages, seqlen_new,
        rotary_half, rotary_positions, low, high, scale, softcap, threshold, inverse_keep,
    ) = call  # fmt: skip
    batch = tl.cast(batch, tl.int64)
    head = tl.cast(head, tl.int64)
    kv_head = head // group_size

    q_start, length_q = sequence(cu_seqlens_q_ptr, seqused_q_ptr, batch, seqlen_q)
    k_start, key_limit = sequence(cu_seqlens_k_ptr, seqused_k_ptr, batch, seqlen_k)
    first_row = tile_m * BLOCK_M
    if cu_seqlens_q_ptr is not None:
        covered = tl.minimum(length_q, tiles_m * BLOCK_M)
        sequences = tl.num_programs(0) // tiles_m // heads
        gap_first, gap_end = gap(cu_seqlens_q_ptr, batch, sequences, q_start, covered, seqlen_q)
        clear_rows(
            out_ptr, gap_first, gap_end, tile_m, tiles_m, heads, head, BLOCK_M, HEAD_DIM_V, BLOCK_DV
        )
        for n in range(gap_first + tile_m * BLOCK_M, gap_end, tiles_m * BLOCK_M):
            row = n + tl.arange(0, BLOCK_M)
            tl.store(lse_ptr + head * stride_lh + row, float("-inf"), mask=row < gap_end)
        if first_row >= length_q:
            return
    length_k = key_limit
    if key_lengths_ptr is not None:
        key_limit = held(key_lengths_ptr, batch, key_limit, seqlen_new)
        if LENGTH_DIAGONAL:
            length_k = key_limit
    shift = length_k - length_q
    cache = batch
    if cache_indices_ptr is not None:
        cache = tl.load(cache_indices_ptr + batch).to(tl.int64)
        cache = tl.minimum(tl.maximum(cache, 0), pages - 1)
    first_key = None
    begin = 0
    if cache_starts_ptr is not None:
        first_key = tl.maximum(tl.load(cache_starts_ptr + batch).to(tl.int64), 0)
        first_key = tl.minimum(first_key, key_limit).to(tl.int32)
        begin = first_key

    # Rows of the tile: PACK heads of each query. Positions inside the sequence, offsets in q.
    local = tl.arange(0, BLOCK_M)
    row = first_row + local
    rows_inside = row < length_q * PACK
    query = row // PACK
    group = row % PACK
    qs = stride_qs * ALIGN
    q_base = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN + q_start * qs
    if PACK == 1:
        q_base += first_row.to(tl.int64) * qs
        q_offsets = local * qs
    else:
        q_offsets = query.to(tl.int64) * qs + group.to(tl.int64) * stride_qh * ALIGN
    q = load_tile(q_base, q_offsets, rows_inside, HEAD_DIM, BLOCK_D)
    if rotary_cos_ptr is not None:
        position = tl.maximum(length_k - seqlen_new, 0) + query * ROTARY_ADVANCES
        q = rotated(
            q, q_base, q_offsets, rows_inside, position, rotary_cos_ptr, rotary_sin_ptr,
            rotary_half, rotary_positions, ROTARY_INTERLEAVED, BLOCK_D,
        )  # fmt: skip
    k_base = k_ptr + kv_head * stride_kh * ALIGN
    v_base = v_ptr + kv_head * stride_vh * ALIGN
    table = None
    if block_table_ptr is not None:
        table = block_table_ptr + batch * stride_table
    else:
        k_base += cache * stride_kb * ALIGN + k_start * stride_ks * ALIGN
        v_base += cache * stride_vb * ALIGN + k_start * stride_vs * ALIGN

    i = query[:, None]
    head_of_row = head
    if PACK > 1:
        head_of_row = (head + group)[:, None]
    # Offsets of the rows from the tile's first one: 32-bit, but for heads in one tile.
    if PACK == 1:
        place = local[:, None]
        token = first_row.to(tl.int64)
    else:
        place = i.to(tl.int64)
        token = tl.cast(0, tl.int64)
    mask_base = None
    mask_rows = None
    if mask_ptr is not None:
        mask_base = mask_ptr + batch * stride_mb + head * stride_mh + token * stride_mq
        mask_rows = place * stride_mq + group[:, None] * stride_mh
    bias_base = None
    bias_rows = None
    if bias_ptr is not None:
        bias_base = bias_ptr + batch * stride_bb + head * stride_bh + token * stride_bq
        bias_rows = place * stride_bq + group[:, None] * stride_bh
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * stride_slope + head_of_row) * LOG2_E
    q_documents = None
    k_documents = None
    if q_documents_ptr is not None:
        ids = q_documents_ptr + batch * stride_qd + q_start + query
        q_documents = tl.load(ids, mask=rows_inside, other=0)[:, None]
        k_documents = k_documents_ptr + batch * stride_kd + k_start
    seed = None
    plane = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        plane = batch * heads + head_of_row

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sink_ptr is not None:
        if split == 0:
            total += 1.0
            sink = tl.load(sink_ptr + head + group).to(tl.float32)
            top = sink * LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

    end = key_limit
    if ranges_ptr is not None:
        pair = ranges_ptr + (batch * tiles_m + tile_m) * 2
        begin = tl.maximum(begin, tl.load(pair))
        end = tl.minimum(end, tl.load(pair + 1))
    if SPLIT:
        part_keys = part_length(key_limit, splits, split_length)
        begin = tl.maximum(begin, split * part_keys)
        end = tl.minimum(end, (split + 1) * part_keys)
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
    strides = (stride_ks, stride_vs, stride_mk, stride_bk, stride_kb, stride_vb)
    if block_offsets_ptr is not None:
        lists = block_offsets_ptr + batch * stride_block_b + head * stride_block_h
        lists += first_row // BLOCK_MASK_Q
        subtiles: tl.constexpr = BLOCK_MASK_K // BLOCK_N
        acc, total, top = _attend(
            acc, total, top, q, k_base, v_base, table, block_indices_ptr, block_partial_ptr,
            block_patterns_ptr, tl.load(lists) * subtiles, tl.load(lists + 1) * subtiles, i,
            rows_inside[:, None], key_limit, lowest, highest, shift, first_key, mask_base,
            mask_rows, bias_base, bias_rows, slope, q_documents, k_documents,
            i % BLOCK_MASK_Q * BLOCK_MASK_K, seed, plane, threshold, scale, softcap, strides,
            page_size, pages, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCK_MASK_Q,
            BLOCK_MASK_K, ALIGN, PRECISION, SCALE_POSITIVE, True,
        )  # fmt: skip
    else:
        last_row = tl.minimum(first_row + BLOCK_M, length_q * PACK) - 1
        left_edge: tl.constexpr = low is not None or cache_starts_ptr is not None
        start, whole_start, whole_end, end = key_range(
            first_row // PACK, last_row // PACK, begin, end, lowest, highest, BLOCK_N, left_edge
        )
        if left_edge:
            acc, total, top = _attend(
                acc, total, top, q, k_base, v_base, table, None, None, None, start, whole_start, i,
                rows_inside[:, None], key_limit, lowest, highest, shift, first_key, mask_base,
                mask_rows, bias_base, bias_rows, slope, q_documents, k_documents, None, seed, plane,
                threshold, scale, softcap, strides, page_size, pages, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                BLOCK_DV, BLOCK_N, 0, 0, ALIGN, PRECISION, SCALE_POSITIVE, True,
            )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q, k_base, v_base, table, None, None, None, whole_start, whole_end, i,
            rows_inside[:, None], key_limit, lowest, highest, shift, first_key, mask_base,
            mask_rows, bias_base, bias_rows, slope, q_documents, k_documents, None, seed, plane,
            threshold, scale, softcap, strides, page_size, pages, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
            BLOCK_DV, BLOCK_N, 0, 0, ALIGN, PRECISION, SCALE_POSITIVE, False,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q, k_base, v_base, table, None, None, None, whole_end, end, i,
            rows_inside[:, None], key_limit, lowest, highest, shift, first_key, mask_base,
            mask_rows, bias_base, bias_rows, slope, q_documents, k_documents, None, seed, plane,
            threshold, scale, softcap, strides, page_size, pages, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
            BLOCK_DV, BLOCK_N, 0, 0, ALIGN, PRECISION, SCALE_POSITIVE, True,
        )  # fmt: skip

    # A row without a key has top -inf and total 0, made 1: out 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if seed_ptr is not None:
        acc *= inverse_keep
    lse = (top + tl.log2(total)) * LN_2
    token = q_start + query
    # ALIGN comes last, so that the compiler sees that rows begin where a wide store may.
    out_offsets = (batch * stride_ob + token * stride_os + (head + group) * stride_oh) * ALIGN
    lse_offsets = batch * stride_lb + (head + group) * stride_lh + token
    if SPLIT:
        if parts_of(key_limit, splits, split_length) > 1:
            part = tl.cast(split, tl.int64)
            part_base = part_out_ptr + part * part_out_stride * ALIGN
            store_tile(part_base, acc, out_offsets, rows_inside, HEAD_DIM_V, BLOCK_DV)
            tl.store(part_lse_ptr + part * part_lse_stride + lse_offsets, lse, mask=rows_inside)
        else:
            store_tile(out_ptr, acc, out_offsets, rows_inside, HEAD_DIM_V, BLOCK_DV)
            tl.store(lse_ptr + lse_offsets, lse, mask=rows_inside)
    else:
        store_tile(out_ptr, acc, out_offsets, rows_inside, HEAD_DIM_V, BLOCK_DV)
        tl.store(lse_ptr + lse_offsets, lse, mask=rows_inside)


class _Plan(NamedTuple):
    """What follows from a call's metadata."""

    x: launching.Layout
    copies: bool  # whether the kernel needs copies of inputs
    launch: launch.Prepared
    block_m: int
    tiles_m: int
    split: tiles.Split


_plans: PlanCache[_Plan] = PlanCache()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a registered call; lse float32."""
    return attend(q, k, v, extras, settings)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
    cache: launching.Cache = launching.NO_CACHE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose tile and split, launch, merge. `cache` has what a cache's keys are found by."""
    key = launching.key(q, k, v, extras, settings, *cache.pointers), cache.numbers
    plan = _plans.get(key)
    if plan is None or plan.copies:
        (q, k, v), extras, copies = launching.prepared(extras, q, k, v)
        if plan is None:
            plan = _plan(q, k, v, extras, settings, cache, copies)
            _plans.put(key, plan)
    x = plan.x
    out, lse = launching.outputs(x, q)
    part_out, part_lse = launching.parts(out, lse, plan.split.most)
    ranges = None
    if extras.q_documents is not None:
        ranges = tile_ranges(x, extras, plan.block_m, plan.tiles_m, of_queries=True)
    plan.launch(
        q,
        k,
        v,
        out,
        lse,
        part_out,
        part_lse,
        *launching.feature_pointers(extras),
        ranges,
        *launching.block_pointers(extras, transposed=False),
        *launching.sequence_pointers(extras),
        extras.dropout_seed,
        *cache.pointers,
    )
    if plan.split.most > 1:
        merge(
            part_out, part_lse, out, lse, extras.key_lengths, x.longest_k, cache.seqlen_new,
            plan.split,
        )  # fmt: skip
    return out, lse


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
    cache: launching.Cache,
    copies: bool,
) -> _Plan:
    x = launching.layout(q, k, v, extras, settings, capacity=cache.capacity)
    group_size = x.heads // x.kv_heads
    # Heads of one tile must agree on the tiles to visit.
    few = tiles.is_decode(x.longest_q, group_size) and extras.blocks is None and not x.packed
    pack = group_size if few else 1
    tile = tiles.tile(
        tiles.DECODE if few else tiles.FORWARD, launch.architecture(x.device), x.element_size,
        max(x.head_dim, x.head_dim_v), tiles.masking(extras, settings),
    ).within(settings.block_q, settings.block_k)  # fmt: skip
    tiles_m = triton.cdiv(x.longest_q * pack, tile.block_m)
    of_sequence = tiles_m * (x.heads // pack)
    split = tiles.Split(1, tiles.SPLIT_KEYS, of_sequence * x.batch)
    if few:
        multiprocessors = launch.multiprocessors(x.device)
        split = tiles.split(x.longest_k, x.batch, of_sequence, multiprocessors, cache.num_splits)
    rows = (1 if x.packed else x.batch) * x.seqlen_q * x.heads
    numbers = (
        *x.strides,
        *launching.result_strides(x, x.heads, x.seqlen_q, x.head_dim_v),
        *launching.lse_strides(x),
        *launching.feature_strides(x, extras),
        *launching.block_strides(extras, transposed=False),
        0 if cache.block_table is None else cache.block_table.stride(0),
        rows * x.head_dim_v // x.align,
        rows,
        x.heads,
        group_size,
        x.seqlen_q,
        x.seqlen_k,
        tiles_m,
        x.batch,
        split.most,
        split.keys,
        k.shape[-3],
        k.shape[0],
        cache.seqlen_new,
        *launching.rotary_sizes(cache),
        *launching.band(settings),
        launching.scale(settings),
        launching.softcap(settings),
        dropout.threshold(settings.dropout_p),
        1.0 / (1.0 - settings.dropout_p),
    )
    prepared = launch.Prepared(
        _forward_kernel,
        (split.programs,),
        numbers,
        **x.widths(),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_MASK_Q=settings.block_q,
        BLOCK_MASK_K=settings.block_k,
        PACK=pack,
        SPLIT=few,
        TOP_LEFT=settings.top_left,
        LENGTH_DIAGONAL=cache.used,
        ROTARY_INTERLEAVED=cache.rotary_interleaved,
        ROTARY_ADVANCES=cache.rotary_advances,
        PRECISION=settings.fp32_precision,
        SCALE_POSITIVE=launching.scale(settings) > launching.LEAST_SCALE,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return _Plan(x, copies, prepared, tile.block_m, tiles_m, split)
