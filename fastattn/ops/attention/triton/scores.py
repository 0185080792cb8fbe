"""Scores of a tile: what stands between the product q k^T and the softmax.

    s = softmax_scale q k^T;  s = softcap tanh(s / softcap);  s -= slope |i + shift - j|;  s += bias
    s = -inf where padding, the band, the mask, documents or the block mask hide key j from query i

Forward and backward kernels share it: a feature is written here once. A call's option that is not
used is None, and no code is compiled for it. Functions of Triton 3.6 cannot return None, so what is
optional is made by `None if x is None else f(x)`.

Positions i of queries and j of keys count inside the sequence, and come as a column and a row:
(BLOCK_M, 1) and (1, BLOCK_N) where tiles are queries by keys, the other way round where they are
keys by queries. Every function here works for both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.common.tanh import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Sizes(NamedTuple):
    """The constants of every kernel of attention."""

    HEAD_DIM: tl.constexpr
    HEAD_DIM_V: tl.constexpr
    BLOCK_D: tl.constexpr  # the next power of two
    BLOCK_DV: tl.constexpr
    BLOCK_M: tl.constexpr  # queries of a tile
    BLOCK_N: tl.constexpr  # keys of a tile
    ALIGN: tl.constexpr  # elements that divide all strides
    PRECISION: tl.constexpr  # of products of float32


class Rule(NamedTuple):
    """How the scores of one head come about, wherever the tile."""

    scale: Any  # softmax_scale, times log2(e) if there is no softcap
    softcap: Any
    slope: Any  # of ALiBi, times log2(e), like i or a scalar
    shift: Any  # of the diagonal, seqlen_k - seqlen_q, for ALiBi
    low: Any  # query i sees the keys j >= i + low
    high: Any  # query i sees the keys j <= i + high
    key_limit: Any  # keys from here on are padding
    first_key: Any = None  # keys before it are hidden
    k_documents: Any = None  # pointer to that of key 0


class Tile(NamedTuple):
    """The other inputs of one tile's scores."""

    inside: Any  # queries that exist, like i
    q_documents: Any  # like i
    mask: Any  # Lane
    bias: Any  # Lane
    first: Any  # where the tile is in its lanes
    local: Any  # and its positions from there, like i or j
    pattern: Any = None  # of the block mask: pointers to its rows, like i
    pattern_columns: Any = None  # like j


# --- where a tile's mask and bias are -------------------------------------------------------------


class Plane(NamedTuple):
    """A mask or a bias as a kernel gets it; a dimension in which it is broadcast has stride 0."""

    ptr: Any
    batch: Any  # strides
    head: Any
    query: Any
    key: Any


class Lane(NamedTuple):
    """A Plane's part of one tile's queries, along all keys; or of its keys, along all queries."""

    base: Any  # pointer to the tile's first query and key 0; or query 0 and its first key
    local: Any  # offsets of the tile's queries from there, like i; or of its keys, like j
    step: Any  # stride from key to key; or from query to query


@triton.jit
def of_queries(x, batch, head, first, local):
    """The Lane of the queries `first` + `local` (like i)."""
    base = x.ptr + batch * x.batch + head * x.head + tl.cast(first, tl.int64) * x.query
    return Lane(base, local * x.query, x.key)


@triton.jit
def of_keys(x, batch, head, first, local):
    """The Lane of the keys `first` + `local` (like j)."""
    base = x.ptr + batch * x.batch + head * x.head + tl.cast(first, tl.int64) * x.key
    return Lane(base, local * x.key, x.query)


@triton.jit
def load_lane(x, first, local, exists):
    """A Lane's tile of the keys (or queries) `first` + `local`."""
    pointers = x.base + tl.cast(first, tl.int64) * x.step + (x.local + local * x.step)
    return tl.load(pointers, mask=exists, other=0)


# --- scores ---------------------------------------------------------------------------------------


@triton.jit
def score_tile(
    products,  # q k^T of the tile
    i,  # query positions
    j,  # key positions
    tile,  # Tile
    rule,  # Rule; a scale of None is 1
    BOUNDARY: tl.constexpr,
    CHECK_KEYS: tl.constexpr,  # keys of the tile may be padding
):
    """(scores in units of log2(e), the softcap's derivative if there is one); -inf where unseen.

    Tiles inside the band and the key limit (not BOUNDARY) need no comparison of positions.
    """
    slope_of_cap = products  # of no meaning without a softcap
    if rule.softcap is not None:
        saturation = tanh(products * (rule.scale / rule.softcap))
        scores = saturation * (rule.softcap * LOG2_E)
        slope_of_cap = 1.0 - saturation * saturation
    else:
        scores = products if rule.scale is None else products * rule.scale
    if rule.slope is not None:
        scores -= rule.slope * tl.abs(i + rule.shift - j).to(tl.float32)
    exists = tile.inside
    if CHECK_KEYS:
        exists = exists & (j < rule.key_limit)
    if tile.bias is not None:
        bias = load_lane(tile.bias, tile.first, tile.local, exists).to(tl.float32)
        scaled = bias * LOG2_E
        # A finite bias stays finite: masks made of the smallest float32 hide, but not a whole row.
        scaled = tl.where((scaled == float("-inf")) & (bias != float("-inf")), -3.4e38, scaled)
        scores += scaled
    if BOUNDARY:
        seen = j < rule.key_limit
        if rule.high is not None:
            seen = seen & (j <= i + rule.high)
        if rule.low is not None:
            seen = seen & (j >= i + rule.low)
        if rule.first_key is not None:
            seen = seen & (j >= rule.first_key)
        scores = tl.where(seen, scores, float("-inf"))
    if tile.mask is not None:
        allowed = load_lane(tile.mask, tile.first, tile.local, exists)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    if tile.q_documents is not None:
        k_documents = tl.load(rule.k_documents + j, mask=j < rule.key_limit, other=0)
        scores = tl.where(tile.q_documents == k_documents, scores, float("-inf"))
    if tile.pattern is not None:
        allowed = tl.load(tile.pattern + tile.pattern_columns)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    return scores, slope_of_cap


_LARGEST = tl.constexpr(268435456.0)  # 2^28


@triton.jit
def exact_beyond(
    unscaled,  # (BLOCK_M,) the highest product of the tile
    highest,  # unscaled * scale, rounded
    top,  # what is subtracted of the scaled products, at least `highest`
    scale,
    power,  # the power of two from scale on
):
    """(scale, top) of each row, such that products * scale - top is never much above 0.

    The compiler makes one instruction of it, which rounds once. So it holds what the rounding of
    top left out: up to 8 where |top| is below 2^28, a common factor of numerator and denominator;
    but hundreds beyond it, where 2^x overflows. There the products of float32 are so far apart
    that no weight but the highest one is above 2^-16, whatever the scale: a power of two makes
    the highest product exact.
    """
    exact = unscaled * power
    huge = (tl.abs(highest) > _LARGEST) & (tl.abs(exact) < float("inf"))
    return tl.where(huge, power, scale), tl.where(huge, exact + (top - highest), top)


@triton.jit
def row_state(lse_ptr, delta_ptr, line, rows, rows_left):
    """(lse in base 2, delta) of a tile's rows; those past the end or without a key get p = 0."""
    inside = rows < rows_left
    lse = tl.load(lse_ptr + line + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + line + rows, mask=inside, other=0.0)
    blind = lse == float("-inf")  # its delta may be infinite, as the gradient of such an LSE is
    return tl.where(blind, float("inf"), lse) * LOG2_E, tl.where(blind, 0.0, delta)
