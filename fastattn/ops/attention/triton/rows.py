"""One tile of queries of the forward pass, from its rows to its results.

forward.py says what is computed and has the kernel, which finds the tile; fold.py has the loop
along the keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention.triton.blocks import kept_range
from fastattn.ops.attention.triton.fold import Pages, Queries, fold
from fastattn.ops.attention.triton.memory import Rows, clear_rows, load_tile, store_tile, strip
from fastattn.ops.attention.triton.rotary import rotated
from fastattn.ops.attention.triton.scores import LN_2, LOG2_E, Lane, Rule, of_queries
from fastattn.ops.attention.triton.sequences import (
    Lengths,
    Parts,
    bound,
    gap,
    held,
    key_range,
    part_length,
    parts_of,
    sequence,
)
from fastattn.ops.common.triton.dropout import Dropout


class Lines(NamedTuple):
    """A tensor of (batch, head, query)."""

    ptr: Any
    batch: Any  # strides
    head: Any


class Documents(NamedTuple):
    """Which document each token belongs to."""

    q_ptr: Any
    k_ptr: Any
    ranges_ptr: Any  # (batch, tiles_m, 2): keys that they leave
    q: Any  # strides from batch to batch
    k: Any


class Cache(NamedTuple):
    """Where a cache has the keys of a sequence; the pointers are None for keys in a row."""

    table_ptr: Any  # (batch, pages of a sequence)
    table: Any  # stride from batch to batch
    indices_ptr: Any  # (batch,)
    starts_ptr: Any  # (batch,)
    k_scale_ptr: Any  # (batch, kv_heads), contiguous, of 8-bit numbers; (kv_heads,) not SCALES_VARY
    v_scale_ptr: Any
    page_size: Any
    pages: Any  # or sequences of a padded cache


class Rotary(NamedTuple):
    """Tables of (positions, half) by which the queries are turned."""

    cos_ptr: Any
    sin_ptr: Any
    half: Any
    positions: Any


class Call(NamedTuple):
    """The kernel's arguments, in groups; the kernel's signature explains each."""

    q: Rows
    k: Rows
    v: Rows
    out: Rows
    lse: Lines
    parts: Parts
    mask: Any  # Plane or None
    bias: Any
    slopes_ptr: Any
    stride_slope: Any
    sink_ptr: Any
    documents: Any  # Documents or None
    blocks: Any  # Blocks or None
    lengths: Lengths
    cache: Cache
    rotary: Any  # Rotary or None
    seed_ptr: Any
    threshold: Any
    inverse_keep: Any
    heads: Any
    group_size: Any
    tiles_m: Any
    low: Any
    high: Any
    scale: Any
    softcap: Any


class Switches(NamedTuple):
    """The other constants of the forward kernel."""

    PACK: tl.constexpr  # query heads that are rows of one tile
    SPLIT: tl.constexpr  # there may be several parts of the keys
    TOP_LEFT: tl.constexpr  # the band begins in that corner, else it ends in the other one
    LENGTH_DIAGONAL: tl.constexpr  # the diagonal follows key_lengths, as of a cache
    ROTARY_INTERLEAVED: tl.constexpr
    ROTARY_ADVANCES: tl.constexpr  # query i stands i after the first, else all at one position
    SCALE_POSITIVE: tl.constexpr
    SCALES_VARY: tl.constexpr  # the cache's, from sequence to sequence


@triton.jit
def attend_rows(
    batch,
    head,  # the first one of the tile
    tile_m,
    part,  # of the keys, 0 if not SPLIT
    call,  # Call
    sizes: tl.constexpr,  # Sizes
    switches: tl.constexpr,  # Switches
):
    """The results of one tile of queries, for one part of the keys if SPLIT."""
    PACK: tl.constexpr = switches.PACK
    batch = tl.cast(batch, tl.int64)
    head = tl.cast(head, tl.int64)
    kv_head = head // call.group_size

    lengths, cache, parts = call.lengths, call.cache, call.parts
    q_start, length_q = sequence(lengths.cu_seqlens_q_ptr, lengths.seqused_q_ptr, batch, lengths.q)
    k_start, key_limit = sequence(lengths.cu_seqlens_k_ptr, lengths.seqused_k_ptr, batch, lengths.k)
    first_row = tile_m * sizes.BLOCK_M
    if lengths.cu_seqlens_q_ptr is not None:
        _clear_gap(batch, head, tile_m, q_start, length_q, call, sizes)
        if first_row >= length_q:
            return
    length_k = key_limit
    if lengths.key_lengths_ptr is not None:
        key_limit = held(lengths.key_lengths_ptr, batch, key_limit, lengths.new)
        if switches.LENGTH_DIAGONAL:
            length_k = key_limit
    shift = length_k - length_q
    slot = batch  # of a padded cache
    if cache.indices_ptr is not None:
        slot = tl.load(cache.indices_ptr + batch).to(tl.int64)
        slot = tl.minimum(tl.maximum(slot, 0), cache.pages - 1)
    first_key = None
    begin = 0
    if cache.starts_ptr is not None:
        first_key = tl.maximum(tl.load(cache.starts_ptr + batch).to(tl.int64), 0)
        first_key = tl.minimum(first_key, key_limit).to(tl.int32)
        begin = first_key

    # Rows of the tile: PACK heads of each query. Positions count inside the sequence, offsets from
    # the tile's first row, in 32 bits; but from query 0 and in 64 bits for heads in one tile.
    local = tl.arange(0, sizes.BLOCK_M)
    row = first_row + local
    inside = row < length_q * PACK
    query = row // PACK
    group = row % PACK
    i = query[:, None]
    if PACK == 1:
        head_of_row = head
        first = first_row
        place = local[:, None]
        of_q = strip(call.q, batch, head, q_start + first_row, sizes.ALIGN)
        q_offsets = local * of_q.stride
    else:
        head_of_row = (head + group)[:, None]
        first = 0
        place = i.to(tl.int64)
        of_q = strip(call.q, batch, head, q_start, sizes.ALIGN)
        q_offsets = query.to(tl.int64) * of_q.stride
        q_offsets += group.to(tl.int64) * call.q.head * sizes.ALIGN
    q = load_tile(of_q.base, q_offsets, inside, sizes.HEAD_DIM, sizes.BLOCK_D)
    if call.rotary is not None:
        rotary = call.rotary
        position = tl.maximum(length_k - lengths.new, 0) + query * switches.ROTARY_ADVANCES
        q = rotated(
            q, of_q.base, q_offsets, inside, position, rotary.cos_ptr, rotary.sin_ptr,
            rotary.half, rotary.positions, switches.ROTARY_INTERLEAVED, sizes.BLOCK_D,
        )  # fmt: skip
    pages = None
    if cache.table_ptr is not None:
        table = cache.table_ptr + batch * cache.table
        pages = Pages(table, cache.page_size, cache.pages, call.k, call.v)
        slot = tl.cast(0, tl.int64)

    mask = None if call.mask is None else _lane(call.mask, batch, head, first, place, group)
    bias = None if call.bias is None else _lane(call.bias, batch, head, first, place, group)
    slope = None
    if call.slopes_ptr is not None:
        slope = tl.load(call.slopes_ptr + batch * call.stride_slope + head_of_row) * LOG2_E
    q_documents = None
    k_documents = None
    if call.documents is not None:
        ids = call.documents.q_ptr + batch * call.documents.q + q_start + query
        q_documents = tl.load(ids, mask=inside, other=0)[:, None]
        k_documents = call.documents.k_ptr + batch * call.documents.k + k_start
    dropout = None
    if call.seed_ptr is not None:
        plane = batch * call.heads + head_of_row
        dropout = Dropout(tl.load(call.seed_ptr), plane, call.threshold, call.inverse_keep)
    # Where scores are nothing but scaled products, the maximum is taken before scaling, which then
    # costs nothing: it is one instruction with the subtraction of the maximum.
    plain: tl.constexpr = call.softcap is None and call.slopes_ptr is None and call.bias is None
    scale = call.scale
    v_scale = None
    if cache.k_scale_ptr is not None:
        place_of_scale = kv_head
        if switches.SCALES_VARY:
            place_of_scale += batch * (call.heads // call.group_size)
        scale = call.scale * tl.load(cache.k_scale_ptr + place_of_scale)
        v_scale = tl.load(cache.v_scale_ptr + place_of_scale)
    rule = Rule(
        scale=None if switches.SCALE_POSITIVE and plain else scale,
        softcap=call.softcap,
        slope=slope,
        shift=shift,
        low=None if call.low is None else bound(call.low, shift, switches.TOP_LEFT),
        high=None if call.high is None else bound(call.high, shift, switches.TOP_LEFT),
        first_key=first_key,
        key_limit=key_limit,
        k_documents=k_documents,
    )
    pattern_row = None
    if call.blocks is not None:
        pattern_row = i % call.blocks.OWN * call.blocks.OTHER
    x = Queries(
        q=q,
        i=i,
        inside=inside[:, None],
        rule=rule,
        scale=scale,
        k=strip(call.k, slot, kv_head, k_start, sizes.ALIGN),
        v=strip(call.v, slot, kv_head, k_start, sizes.ALIGN),
        pages=pages,
        mask=mask,
        bias=bias,
        q_documents=q_documents,
        blocks=call.blocks,
        pattern_row=pattern_row,
        dropout=dropout,
    )

    top = tl.full((sizes.BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((sizes.BLOCK_M,), tl.float32)
    if call.sink_ptr is not None:
        if part == 0:
            total += 1.0
            sink = tl.load(call.sink_ptr + head + group).to(tl.float32)
            top = sink * LOG2_E
    acc = tl.zeros((sizes.BLOCK_M, sizes.BLOCK_DV), tl.float32)
    if call.blocks is not None:
        start, end = kept_range(call.blocks, batch, head, first_row, sizes.BLOCK_N)
        acc, total, top = fold(acc, total, top, start, end, x, sizes, True)
    else:
        end = key_limit
        if call.documents is not None:
            pair = call.documents.ranges_ptr + (batch * call.tiles_m + tile_m) * 2
            begin = tl.maximum(begin, tl.load(pair))
            end = tl.minimum(end, tl.load(pair + 1))
        if switches.SPLIT:
            part_keys = part_length(key_limit, parts.most, parts.length)
            begin = tl.maximum(begin, part * part_keys)
            end = tl.minimum(end, (part + 1) * part_keys)
        last_row = tl.minimum(first_row + sizes.BLOCK_M, length_q * PACK) - 1
        left_edge: tl.constexpr = call.low is not None or first_key is not None
        first, last = first_row // PACK, last_row // PACK
        start, whole_start, whole_end, end = key_range(
            first, last, begin, end, rule.low, rule.high, sizes.BLOCK_N, left_edge
        )
        if left_edge:
            acc, total, top = fold(acc, total, top, start, whole_start, x, sizes, True)
        acc, total, top = fold(acc, total, top, whole_start, whole_end, x, sizes, False)
        acc, total, top = fold(acc, total, top, whole_end, end, x, sizes, True)

    # A row without a key has top -inf and total 0, made 1: out 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if v_scale is not None:
        acc *= v_scale
    if dropout is not None:
        acc *= dropout.inverse_keep
    lse = (top + tl.log2(total)) * LN_2
    token = q_start + query
    # ALIGN comes last, so that the compiler sees that rows begin where a wide store may.
    out_offsets = batch * call.out.batch + token * call.out.token + (head + group) * call.out.head
    out_offsets = out_offsets * sizes.ALIGN
    lse_offsets = batch * call.lse.batch + (head + group) * call.lse.head + token
    if switches.SPLIT and parts_of(key_limit, parts.most, parts.length) > 1:
        number = tl.cast(part, tl.int64)
        out_ptr = parts.out_ptr + number * parts.out * sizes.ALIGN
        store_tile(out_ptr, acc, out_offsets, inside, sizes.HEAD_DIM_V, sizes.BLOCK_DV)
        tl.store(parts.lse_ptr + number * parts.lse + lse_offsets, lse, mask=inside)
    else:
        store_tile(call.out.ptr, acc, out_offsets, inside, sizes.HEAD_DIM_V, sizes.BLOCK_DV)
        tl.store(call.lse.ptr + lse_offsets, lse, mask=inside)


@triton.jit
def _lane(x, batch, head, first, place, group):
    """A Plane's Lane of rows of several heads."""
    lane = of_queries(x, batch, head, first, place)
    return Lane(lane.base, lane.local + group[:, None] * x.head, lane.step)


@triton.jit
def _clear_gap(batch, head, tile_m, q_start, length_q, call, sizes: tl.constexpr):
    """Tokens that no sequence has: out 0, lse -inf."""
    rows = call.tiles_m * sizes.BLOCK_M  # of all tiles of a sequence
    sequences = tl.num_programs(0) // call.tiles_m // call.heads
    covered = tl.minimum(length_q, rows)
    cu_seqlens_ptr, tokens = call.lengths.cu_seqlens_q_ptr, call.lengths.q
    first, end = gap(cu_seqlens_ptr, batch, sequences, q_start, covered, tokens)
    BLOCK_M: tl.constexpr = sizes.BLOCK_M
    HEAD_DIM: tl.constexpr = sizes.HEAD_DIM_V
    clear_rows(
        call.out.ptr, first, end, tile_m, call.tiles_m, call.heads, head, BLOCK_M, HEAD_DIM,
        sizes.BLOCK_DV,
    )  # fmt: skip
    for n in range(first + tile_m * BLOCK_M, end, rows):
        row = n + tl.arange(0, BLOCK_M)
        tl.store(call.lse.ptr + head * call.lse.head + row, float("-inf"), mask=row < end)
