"""The scores of the backward: which of them a program has, in which trips, and what they become."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.attention.gluon.arguments import length


class Kind(NamedTuple):
    """The constants of a kernel."""

    D: gl.constexpr  # the box of q, k, v and dO: a power of two
    BM: gl.constexpr  # queries of a tile
    STAGES: gl.constexpr
    LEFT: gl.constexpr  # whether the band has this side
    RIGHT: gl.constexpr
    CAPPED: gl.constexpr
    SLOPED: gl.constexpr  # ALiBi
    BOUNDED: gl.constexpr  # a tile may read what lies beyond the keys
    PACKED: gl.constexpr  # or beyond the queries


class Sizes(NamedTuple):
    """Of a call."""

    heads: Any
    kv_heads: Any
    seqlen_q: Any  # packed: total
    seqlen_k: Any
    key_tiles: Any  # of the longest sequence
    tiles: Any  # of rows of a head: rows.Tiles
    left: Any  # of the window
    right: Any


class Lengths(NamedTuple):
    """Pointers, or None."""

    keys: Any  # (batch,), key_lengths
    cu_seqlens_q: Any  # (batch + 1,)
    cu_seqlens_k: Any
    used_q: Any  # (batch,)
    used_k: Any


class Rule(NamedTuple):
    """How scores come about, to base 2; where they are seen, `place` says."""

    scale: Any  # if CAPPED 2 / cap of it
    cap: Any
    slopes: Any  # pointer to that of the first head, not to base 2


class Place(NamedTuple):
    """128 keys of a head and the queries that see them.

    A trip is a tile of queries of one head. Trips run from the last tile to the first, and over the
    heads of the group in each of them.
    """

    sequence: Any
    batch: Any  # 0 if packed
    head: Any  # the first query head
    kv_head: Any
    group: Any
    start_q: Any  # of the sequence, in the packed tensors
    start_k: Any
    start_sums: Any  # and in the sums of dQ
    tiles: Any  # of rows of a head
    rows: Any  # the tile of rows of the first head's first queries
    queries: Any  # how many
    keys: Any  # how many are to be seen
    corner: Any  # how many more keys than queries
    low: Any  # query i sees the keys from i + low
    high: Any  # to i + high
    tile: Any  # of keys
    stop: Any  # after the last tile of queries
    trips: Any
    ragged: Any  # the first of them, if the queries end inside of the last tile, and PACKED
    first: Any  # the first of them, which those and the band's left edge cross
    whole: Any  # those from `first` on and before this one: each query sees each key


@gluon.jit
def visited(n, place):
    """(head of the group, tile of queries) of trip `n`."""
    return n % place.group, place.stop - 1 - n // place.group


@gluon.jit
def place_of_program(sizes, lengths, TOP_LEFT: gl.constexpr, kind: gl.constexpr):
    # The key tiles of 8 heads in turn: enough of one head run at once to share its queries in the
    # L2 cache, and few of them begin at once and then wait for their turns to add to dQ.
    begin = gl.program_id(0) // (sizes.key_tiles * 8) * 8
    among = gl.minimum(gl.num_programs(0) // sizes.key_tiles - begin, 8)
    rest = gl.program_id(0) - begin * sizes.key_tiles
    tile = rest // among
    plane = begin + rest % among
    kv_head = plane % sizes.kv_heads
    sequence = plane // sizes.kv_heads
    group = sizes.heads // sizes.kv_heads
    head = kv_head * group
    seqlen_q = sizes.seqlen_q
    seqlen_k = sizes.seqlen_k
    start_q = tile * 0
    start_k = start_q
    start_sums = start_q
    batch = sequence
    rows = (batch * sizes.heads + head) * sizes.tiles
    if kind.PACKED:
        start_q, seqlen_q = length(lengths.cu_seqlens_q, lengths.used_q, sequence)
        start_k, seqlen_k = length(lengths.cu_seqlens_k, lengths.used_k, sequence)
        batch = batch * 0
        start_sums = start_q // kind.BM + sequence
        rows = head * sizes.tiles + start_sums
        start_sums *= kind.BM
    keys = seqlen_k
    if lengths.keys is not None:
        keys = gl.minimum(keys, gl.maximum(gl.load(lengths.keys + sequence).to(gl.int32), 0))

    corner = seqlen_k - seqlen_q
    shift = corner
    if TOP_LEFT:
        shift = corner * 0
    low = shift - sizes.left
    high = shift + sizes.right
    key = tile * 128
    end = gl.minimum(key + 128, keys)
    start = tile * 0
    stop = gl.cdiv(seqlen_q, kind.BM)
    if kind.RIGHT:
        start = gl.minimum(gl.maximum(key - high, 0) // kind.BM, stop)
    if kind.LEFT:  # the last key is seen up to the query end - 1 - low
        stop = gl.minimum(stop, gl.cdiv(gl.maximum(end - low, 0), kind.BM))
    trips = gl.maximum(stop - start, 0)
    if kind.BOUNDED:
        if key >= keys:
            trips = trips * 0
    whole = tile * 0
    if key + 128 <= keys:
        whole = trips
        if kind.RIGHT:  # the first query sees the last key
            whole = stop - gl.cdiv(gl.maximum(end - 1 - high, 0), kind.BM)
    ragged = tile * 0
    if kind.PACKED:
        if stop * kind.BM > seqlen_q:
            ragged = gl.minimum(trips, 1)
    first = ragged
    if kind.LEFT:  # the last query sees the first key
        first = gl.maximum(first, stop - gl.maximum(key - low + 1, 0) // kind.BM)
        first = gl.minimum(first, trips)
    return Place(
        sequence, batch, head, kv_head, group, start_q, start_k, start_sums, sizes.tiles, rows,
        seqlen_q, keys, corner, low, high, tile, stop, group * trips, group * ragged,
        group * first, group * whole,
    )  # fmt: skip


@gluon.jit
def probabilities(
    s, lse, n, zero, place, rule, kind: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr
):
    """(P, dS / (dP - delta)) of K Q^T, keys by queries: two things under a cap."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.BM, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    s = s * rule.scale
    if kind.CAPPED:  # tanh(x) = 1 - u with u = 2 / (e^2x + 1); its derivative is u (2 - u)
        u = 2 / (gl.exp2(s) + 1)
        s = rule.cap - rule.cap * u
    member, tile = visited(n, place)
    row = gl.arange(0, 64, gl.SliceLayout(1, S))
    column = gl.arange(0, kind.BM, COLUMN)
    key = place.tile * 128 + WHICH * 64
    query = tile * kind.BM
    if kind.SLOPED:
        slope = gl.load(rule.slopes + member) * 1.4426950408889634
        ahead = (row + (key - query - place.corner)).to(gl.float32)
        s = s - slope * gl.abs(ahead[:, None] - (column + zero).to(gl.float32)[None, :])
    p = gl.exp2(s - lse[None, :])
    if MASKED:
        keys = key + row
        queries = (query + column)[None, :]
        seen = (keys < place.keys)[:, None]
        if kind.LEFT:
            seen = seen & (queries <= (keys - place.low)[:, None])
        if kind.RIGHT:
            seen = seen & (queries >= (keys - place.high)[:, None])
        p = gl.where(seen, p, 0.0)
    if kind.CAPPED:
        return p, p * (u * (2 - u))
    else:
        return p, p
