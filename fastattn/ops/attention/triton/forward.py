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

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import Extras, Settings, forward_results
from fastattn.ops.attention.triton import launching, merge
from fastattn.ops.attention.triton.blocks import Blocks
from fastattn.ops.attention.triton.documents import TileRanges
from fastattn.ops.attention.triton.memory import Rows
from fastattn.ops.attention.triton.rows import (
    Cache,
    Call,
    Documents,
    Lines,
    Rotary,
    Switches,
    attend_rows,
)
from fastattn.ops.attention.triton.scores import Plane, Sizes
from fastattn.ops.attention.triton.sequences import Lengths, Parts, find_part
from fastattn.ops.common import launch
from fastattn.ops.common.plans import PlanCache


@triton.jit(do_not_specialize=launching.SIZES)
def _forward_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim); packed: batch 1
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim); paged: (pages, page_size, ...)
    v_ptr,
    out_ptr,  # (batch, seqlen_q, heads, head_dim_v), contiguous
    lse_ptr,  # (batch, heads, seqlen_q), contiguous; packed: (heads, total_q)
    part_out_ptr,  # (splits, *out.shape), float32, contiguous, if SPLIT
    part_lse_ptr,  # (splits, *lse.shape)
    sink_ptr,  # (heads,)
    ranges_ptr,  # (batch, tiles_m, 2): keys that the documents leave
    mask_ptr,  # uint8, of shape (batch, heads, seqlen_q, seqlen_k) or 1 for any of them
    bias_ptr,  # likewise
    slopes_ptr,  # (heads,) or (batch, heads)
    key_lengths_ptr,  # (batch,) without seqlen_new
    q_documents_ptr, k_documents_ptr,  # of tokens
    block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,  # blocks.py
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr,  # (batch + 1,), (batch,)
    seed_ptr,
    block_table_ptr,  # (batch, pages of a sequence)
    cache_indices_ptr,  # (batch,)
    cache_starts_ptr,  # (batch,)
    rotary_cos_ptr,
    rotary_sin_ptr,
    k_scale_ptr,  # (kv_heads,), or (batch, kv_heads) if SCALES_VARY
    v_scale_ptr,
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
    stride_part_out: tl.int64,  # from split to split, in units of ALIGN
    stride_part_lse: tl.int64,
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
    low, high,  # -left and right; None for no bound
    scale, softcap, threshold, inverse_keep,  # scores.py
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK_Q: tl.constexpr, BLOCK_MASK_K: tl.constexpr,
    TOP_LEFT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    PACK: tl.constexpr, SPLIT: tl.constexpr, LENGTH_DIAGONAL: tl.constexpr,  # Switches
    ROTARY_INTERLEAVED: tl.constexpr, ROTARY_ADVANCES: tl.constexpr, SCALE_POSITIVE: tl.constexpr,
    SCALES_VARY: tl.constexpr,
):  # fmt: skip
    sizes: tl.constexpr = Sizes(
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION
    )
    switches: tl.constexpr = Switches(
        PACK,
        SPLIT,
        TOP_LEFT,
        LENGTH_DIAGONAL,
        ROTARY_INTERLEAVED,
        ROTARY_ADVANCES,
        SCALE_POSITIVE,
        SCALES_VARY,
    )
    mask = None
    if mask_ptr is not None:
        mask = Plane(mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk)
    bias = None
    if bias_ptr is not None:
        bias = Plane(bias_ptr, stride_bb, stride_bh, stride_bq, stride_bk)
    documents = None
    if q_documents_ptr is not None:
        documents = Documents(q_documents_ptr, k_documents_ptr, ranges_ptr, stride_qd, stride_kd)
    blocks = None
    if block_offsets_ptr is not None:
        blocks = Blocks(
            block_offsets_ptr, block_indices_ptr, block_partial_ptr, block_patterns_ptr,
            stride_block_b, stride_block_h, BLOCK_MASK_Q, BLOCK_MASK_K,
        )  # fmt: skip
    rotary = None
    if rotary_cos_ptr is not None:
        rotary = Rotary(rotary_cos_ptr, rotary_sin_ptr, rotary_half, rotary_positions)
    parts = Parts(
        splits, split_length, part_out_ptr, part_lse_ptr, stride_part_out, stride_part_lse
    )
    lengths = Lengths(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr, key_lengths_ptr,
        seqlen_q, seqlen_k, seqlen_new,
    )  # fmt: skip
    call = Call(
        q=Rows(q_ptr, stride_qb, stride_qs, stride_qh),
        k=Rows(k_ptr, stride_kb, stride_ks, stride_kh),
        v=Rows(v_ptr, stride_vb, stride_vs, stride_vh),
        out=Rows(out_ptr, stride_ob, stride_os, stride_oh),
        lse=Lines(lse_ptr, stride_lb, stride_lh),
        parts=parts,
        mask=mask,
        bias=bias,
        slopes_ptr=slopes_ptr,
        stride_slope=stride_slope,
        sink_ptr=sink_ptr,
        documents=documents,
        blocks=blocks,
        lengths=lengths,
        cache=Cache(
            block_table_ptr,
            stride_table,
            cache_indices_ptr,
            cache_starts_ptr,
            k_scale_ptr,
            v_scale_ptr,
            page_size,
            pages,
        ),
        rotary=rotary,
        seed_ptr=seed_ptr,
        threshold=threshold,
        inverse_keep=inverse_keep,
        heads=heads,
        group_size=group_size,
        tiles_m=tiles_m,
        low=low,
        high=high,
        scale=scale,
        softcap=softcap,
    )
    # One grid axis, for batch * heads may pass 65535. Neighbours share a head, so its keys stay in
    # the L2; under a causal mask the longest rows of tiles start first.
    head_tiles = heads // PACK
    if SPLIT:
        # Programs take the parts that the sequences have in turns. Key heads are neighbours: they
        # share their pages of DRAM.
        tiles_of_part = tiles_m * head_tiles
        parts_in_all = find_part(0, batch_size, lengths, parts)[2]
        items = parts_in_all * tiles_of_part
        first = tl.program_id(0).to(tl.int64)
        # Computed before the loop, this would hold a hundred registers in it.
        for item in tl.range(first, items, tl.num_programs(0), disable_licm=True):
            batch, part, _ = find_part(item // tiles_of_part, batch_size, lengths, parts)
            tile = (item % tiles_of_part).to(tl.int32)
            head = tile // tiles_m * PACK
            attend_rows(batch, head, tile % tiles_m, part, call, sizes, switches)
    else:
        program = tl.program_id(0)
        tile_m = program % tiles_m
        if high is not None:
            tile_m = tiles_m - 1 - tile_m
        head = program // tiles_m % head_tiles * PACK
        batch = program // tiles_m // head_tiles
        attend_rows(batch, head, tile_m, 0, call, sizes, switches)


class _Plan(NamedTuple):
    """The launches of calls with the same metadata."""

    copies: bool  # whether the kernel needs copies of inputs
    ranges: TileRanges | None
    launch: launch.Prepared
    splits: int  # parts of a sequence at most
    merge: launch.Prepared | None


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
    out, lse = forward_results(q, v, extras, settings)
    part_out, part_lse = launching.parts(out, lse, plan.splits)
    plan.launch(
        q,
        k,
        v,
        out,
        lse,
        part_out,
        part_lse,
        extras.sink,
        None if plan.ranges is None else plan.ranges(extras),
        *launching.pointers(extras, transposed=False),
        *cache.pointers,
    )
    if plan.merge is not None:
        plan.merge(part_out, part_lse, out, lse, extras.key_lengths)
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
    tile = launching.tile(tiles.DECODE if few else tiles.FORWARD, x, extras, settings)
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
        *launching.strides(x, extras, transposed=False),
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
        *launching.arithmetic(settings),
    )
    prepared = launch.Prepared(
        _forward_kernel,
        (split.programs,),
        numbers,
        **launching.constants(x, settings, tile),
        PACK=pack,
        SPLIT=few,
        LENGTH_DIAGONAL=cache.used,
        ROTARY_INTERLEAVED=cache.rotary_interleaved,
        ROTARY_ADVANCES=cache.rotary_advances,
        # The scale of stored keys is the device's to know; it may be as small as any.
        SCALE_POSITIVE=cache.k_scale is None and launching.scale(settings) > launching.LEAST_SCALE,
        SCALES_VARY=cache.k_scale is not None and cache.k_scale.dim() == 2,
    )
    ranges = None
    if extras.q_documents is not None:
        ranges = TileRanges(x, tile.block_m, tiles_m, of_queries=True)
    join = None
    if split.most > 1:
        shape = (x.batch, x.seqlen_q, x.heads, x.head_dim_v)
        join = merge.prepared(shape, x.longest_k, cache.seqlen_new, split)
    return _Plan(copies, ranges, prepared, split.most, join)
