"""One tile of queries of the forward pass: its rows, its walk along the keys, its results.

forward.py says what is computed, and has the kernel, which finds the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention.triton.blocks import kept_range, kept_tile, pattern_of
from fastattn.ops.attention.triton.memory import (
    Rows,
    Strip,
    clear_rows,
    load_rows,
    load_tile,
    store_tile,
    strip,
)
from fastattn.ops.attention.triton.rotary import rotated
from fastattn.ops.attention.triton.scores import (
    LN_2,
    LOG2_E,
    Dropout,
    Lane,
    Rule,
    Tile,
    exact_beyond,
    keep_tile,
    of_queries,
    score_tile,
)
from fastattn.ops.attention.triton.sequences import (
    bound,
    gap,
    held,
    key_range,
    part_length,
    parts_of,
    sequence,
)


class Pages(NamedTuple):
    """Keys and values in pages of a cache."""

    table: Any  # pointer to the numbers of the sequence's pages
    page_size: Any
    pages: Any  # of the cache
    k: Rows  # whose batch is the page, and token the slot in it
    v: Rows


class Queries(NamedTuple):
    """A tile of queries, and what it takes to go along the keys."""

    q: Any  # (BLOCK_M, BLOCK_D)
    i: Any  # (BLOCK_M, 1) positions, of which the fields below have one value or one for each
    inside: Any  # rows that exist
    rule: Rule  # its scale is None where the maximum of unscaled scores is taken
    scale: Any
    k: Strip  # from key 0 on; of paged ones, from the start of page 0
    v: Strip
    pages: Any  # Pages or None
    mask: Any  # Lane or None
    bias: Any
    q_documents: Any
    blocks: Any  # Blocks or None
    pattern_row: Any  # offset of a row inside a tile of the block mask
    dropout: Any  # Dropout or None


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_DV)
    total,  # (BLOCK_M,) l
    top,  # (BLOCK_M,) m
    start,  # keys from start to end; with blocks: places in lists, times their subtiles
    end,
    x,  # Queries
    sizes: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Fold key tiles into the running softmax."""
    local = tl.arange(0, sizes.BLOCK_N)
    SCALED_LAST: tl.constexpr = x.rule.scale is None
    if SCALED_LAST:
        power = tl.exp2(tl.ceil(tl.log2(x.scale)))
    step: tl.constexpr = sizes.BLOCK_N if x.blocks is None else 1
    for t in range(start, end, step):
        n = t
        pattern = None
        pattern_columns = None
        if x.blocks is not None:
            n, inner, entry = kept_tile(x.blocks, t, sizes.BLOCK_N)
            if x.blocks.patterns_ptr is not None:
                pattern = pattern_of(x.blocks, entry) + x.pattern_row
                pattern_columns = inner + local[None, :]
        j = n + local
        inside = None
        if BOUNDARY:
            inside = j < x.rule.key_limit
            if x.rule.first_key is not None:
                inside = inside & (j >= x.rule.first_key)
        if x.pages is None:
            k = load_rows(x.k, n, local, inside, sizes.HEAD_DIM, sizes.BLOCK_D)
        else:
            page, slot = _find_slots(x.pages, j, x.rule.key_limit)
            k_offsets = _slot_offsets(x.pages.k, page, slot, sizes)
            k = load_tile(x.k.base, k_offsets, inside, sizes.HEAD_DIM, sizes.BLOCK_D)
        tile = Tile(
            inside=x.inside,
            q_documents=x.q_documents,
            mask=x.mask,
            bias=x.bias,
            first=n,
            local=local[None, :],
            pattern=pattern,
            pattern_columns=pattern_columns,
        )
        products = tl.dot(x.q, k.T, input_precision=sizes.PRECISION)
        scores, _ = score_tile(products, x.i, j[None, :], tile, x.rule, BOUNDARY, BOUNDARY)
        highest = tl.max(scores, 1)
        unscaled = highest
        if SCALED_LAST:
            highest *= x.scale
        new_top = tl.maximum(top, highest)
        # A row that has seen no key yet has the maximum -inf; -inf - -inf would be NaN.
        harmless = tl.where(new_top == float("-inf"), 0.0, new_top)
        if SCALED_LAST:
            row_scale, row_top = exact_beyond(unscaled, highest, harmless, x.scale, power)
            p = tl.exp2(scores * row_scale[:, None] - row_top[:, None])
        else:
            p = tl.exp2(scores - harmless[:, None])
        alpha = tl.exp2(top - harmless)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if x.dropout is not None:
            p = tl.where(keep_tile(x.dropout, x.i, n, sizes.BLOCK_N, False), p, 0.0)
        if x.pages is None:
            v = load_rows(x.v, n, local, inside, sizes.HEAD_DIM_V, sizes.BLOCK_DV)
        else:
            v_offsets = _slot_offsets(x.pages.v, page, slot, sizes)
            v = load_tile(x.v.base, v_offsets, inside, sizes.HEAD_DIM_V, sizes.BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=sizes.PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def _find_slots(x, j, key_limit):
    """(pages, slots in them) of the keys j, in 64 bits."""
    page = tl.load(x.table + j // x.page_size, mask=j < key_limit, other=0)
    page = tl.minimum(tl.maximum(page, 0), x.pages - 1).to(tl.int64)
    return page, (j % x.page_size).to(tl.int64)


@triton.jit
def _slot_offsets(x, page, slot, sizes: tl.constexpr):
    # Both products are of 32-bit numbers, to 64 bits: one instruction each.
    return (page * x.batch.to(tl.int64) + slot * x.token) * sizes.ALIGN


@triton.jit
def attend_rows(
    batch,
    head,  # the first one of the tile
    tile_m,
    part,  # of the keys, 0 if not SPLIT
    call,  # Call
    sizes: tl.constexpr,
    switches: tl.constexpr,
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

    # Rows of the tile: PACK heads of each query. Positions inside the sequence, offsets in q.
    local = tl.arange(0, sizes.BLOCK_M)
    row = first_row + local
    inside = row < length_q * PACK
    query = row // PACK
    group = row % PACK
    if PACK == 1:
        of_q = strip(call.q, batch, head, q_start + first_row, sizes.ALIGN)
        q_offsets = local * of_q.stride
    else:
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

    i = query[:, None]
    head_of_row = head
    if PACK > 1:
        head_of_row = (head + group)[:, None]
    # Offsets of the rows from the tile's first one: 32-bit, but for heads in one tile.
    if PACK == 1:
        place = local[:, None]
        first = first_row
    else:
        place = i.to(tl.int64)
        first = 0
    mask = None if call.mask is None else _lane(call.mask, batch, head, first, place, group)
    bias = None if call.bias is None else _lane(call.bias, batch, head, first, place, group)
    slope = None
    if call.slopes is not None:
        slope = tl.load(call.slopes[0] + batch * call.slopes[1] + head_of_row) * LOG2_E
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
    plain: tl.constexpr = call.softcap is None and call.slopes is None and call.bias is None
    rule = Rule(
        scale=None if switches.SCALE_POSITIVE and plain else call.scale,
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
        scale=call.scale,
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
        acc, total, top = _attend(acc, total, top, start, end, x, sizes, True)
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
        start, whole_start, whole_end, end = key_range(
            first_row // PACK, last_row // PACK, begin, end, rule.low, rule.high, sizes.BLOCK_N,
            left_edge,
        )  # fmt: skip
        if left_edge:
            acc, total, top = _attend(acc, total, top, start, whole_start, x, sizes, True)
        acc, total, top = _attend(acc, total, top, whole_start, whole_end, x, sizes, False)
        acc, total, top = _attend(acc, total, top, whole_end, end, x, sizes, True)

    # A row without a key has top -inf and total 0, made 1: out 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if dropout is not None:
        acc *= dropout.inverse_keep
    lse = (top + tl.log2(total)) * LN_2
    token = q_start + query
    head_of_row = head + group
    # ALIGN comes last, so that the compiler sees that rows begin where a wide store may.
    out_offsets = (
        batch * call.out.batch + token * call.out.token + head_of_row * call.out.head
    ) * sizes.ALIGN
    lse_offsets = batch * call.lse.batch + head_of_row * call.lse.head + token
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
    first, end = gap(
        call.lengths.cu_seqlens_q_ptr, batch, sequences, q_start, tl.minimum(length_q, rows),
        call.lengths.q,
    )  # fmt: skip
    clear_rows(
        call.out.ptr, first, end, tile_m, call.tiles_m, call.heads, head, sizes.BLOCK_M,
        sizes.HEAD_DIM_V, sizes.BLOCK_DV,
    )  # fmt: skip
    for n in range(first + tile_m * sizes.BLOCK_M, end, rows):
        row = n + tl.arange(0, sizes.BLOCK_M)
        tl.store(call.lse.ptr + head * call.lse.head + row, float("-inf"), mask=row < end)
