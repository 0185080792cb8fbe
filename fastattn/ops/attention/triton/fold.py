"""The loop of the forward pass: key tiles are folded into the running softmax of a query tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention.triton.blocks import kept_tile, pattern_of
from fastattn.ops.attention.triton.memory import Rows, Strip, load_rows, load_tile
from fastattn.ops.attention.triton.scores import Rule, Tile, exact_beyond, score_tile
from fastattn.ops.attention.triton.stored import widened
from fastattn.ops.common.triton.dropout import keep_tile


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
def fold(
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
        if k.dtype != x.q.dtype:  # of a cache of 8-bit numbers
            k = widened(k, x.q.dtype)
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
        if v.dtype != x.q.dtype:
            v = widened(v, x.q.dtype)
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
