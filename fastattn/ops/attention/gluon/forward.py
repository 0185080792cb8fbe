"""Attention forward on Hopper: consumers of 64 queries each, and a producer that fetches.

A program has two or three consumers, for 128 or 192 queries of a head. Its producer copies tiles of
keys and values by TMA into a ring of shared memory; each consumer, a warpgroup, runs for its rows

    S = Q K^T of this tile and O += P V of the last one   (wgmma, both in flight)
    m' = max(m, rowmax S);  P = 2^(S - m');  l = l 2^(m - m') + rowsum P;  O = O 2^(m - m')

and issues its products in `turn`, so that its exponentials run under the other ones' products
(Shah et al. 2024, arXiv:2407.08608). A kernel that is `kind.EARLY` hands the turn on after S, and
scales O in the next trip, under the products of the consumer before it.

The tiles run from the last key to the first. Those that the end of the keys or an edge of the band
crosses are masked, in loops of their own; the loop between them has no arithmetic of positions.

Each stage of the ring has four barriers. `k_full` and `v_full` wait for the copy's bytes, `k_empty`
and `v_empty` for all consumers' products: the producer waits for the last before it copies again.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.ops.attention import call
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.gluon import tiles
from fastattn.ops.attention.gluon.arguments import Kind, Place, Results, Ring, Rule, length
from fastattn.ops.attention.gluon.arithmetic import exponentials, products, wide
from fastattn.ops.common import gluon as kernels
from fastattn.ops.common.gluon import mbarrier, tma

LOG2_E = math.log2(math.e)
LN_2 = gl.constexpr(math.log(2))
ALL = gl.constexpr(tl.PropagateNan.ALL)
LOWEST = gl.constexpr(-3e38)  # below any score, and finite: rows without keys give no NaN
# A scale below may be zero in float32, and zero times -inf is NaN.
LEAST_SCALE = 1e-37


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    slot += 1
    if slot == STAGES:
        slot = slot * 0
        phase ^= 1
    return slot, phase


@gluon.jit
def produce(k_desc, v_desc, place, ring, kind: gl.constexpr):
    slot = place.tiles * 0
    phase = slot + 1  # the ring begins empty
    for i in range(place.tiles):
        key = (place.tile + place.tiles - 1 - i) * kind.BN
        mbarrier.wait(ring.k_empty.index(slot), phase)
        mbarrier.expect(ring.k_full.index(slot), kind.BN * kind.D * 2)
        tma.async_load(
            k_desc,
            [place.batch, place.start_k + key, place.kv_head, 0],
            ring.k_full.index(slot),
            ring.k.index(slot),
        )
        mbarrier.wait(ring.v_empty.index(slot), phase)
        mbarrier.expect(ring.v_full.index(slot), kind.BN * kind.DV * 2)
        tma.async_load(
            v_desc,
            [place.batch, place.start_k + key, place.kv_head, 0],
            ring.v_full.index(slot),
            ring.v.index(slot),
        )
        slot, phase = advance(slot, phase, kind.STAGES)


@gluon.jit
def wait_turn(ring, i, WHICH: gl.constexpr):
    """Until the consumer before has issued its products of trip `i`, for the first one of i - 1."""
    FIRST: gl.constexpr = 1 if WHICH == 0 else 0
    mbarrier.wait(ring.turn.index(WHICH), (i + FIRST) & 1)


@gluon.jit
def scores(s, row, key, rule, kind: gl.constexpr, MASKED: gl.constexpr):
    """Of the products of a tile: to base 2 if kind.SCALED, else without the last scale."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.BN, 16])
    if kind.CAPPED:  # tanh(x) = (e^2x - 1) / (e^2x + 1); its argument is kept from infinity
        e = gl.exp2(gl.minimum(s * rule.inner, 64.0, propagate_nan=ALL))
        s = (e - 1.0) / (e + 1.0)
    if kind.SCALED:
        s = s * rule.scale
    rows = row + gl.arange(0, kind.BM, gl.SliceLayout(1, S))
    columns = (key + gl.arange(0, kind.BN, gl.SliceLayout(0, S)))[None, :]
    if kind.SLOPED:
        distance = gl.abs((columns - (rows + rule.corner)[:, None]).to(gl.float32))
        s = s - rule.slope * distance
    if MASKED:
        end = rule.keys
        if kind.RIGHT:
            end = gl.minimum(rows + rule.high + 1, end)[:, None]
        seen = columns < end
        if kind.LEFT:
            seen = seen & (columns >= (rows + rule.low)[:, None])
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def trip(
    acc, alpha, total, top, p, old, old_phase, slot, phase,  # of the last trip
    i, q, row, place, rule, ring,
    kind: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The scores of tile `i`, and the products of the last tile's `p` with its values."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.DV, 16])
    key = (place.tile + place.tiles - 1 - i) * kind.BN
    if kind.EARLY:
        k = ring.k.index(slot)
        v = ring.v.index(old).reshape([kind.BN, kind.DV])
        mbarrier.wait(ring.k_full.index(slot), phase)
        mbarrier.wait(ring.v_full.index(old), old_phase)
        wait_turn(ring, i, WHICH)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        s = products(q, k, kind)
        mbarrier.arrive(ring.turn.index((WHICH + 1) % kind.CONSUMERS), count=1)
        acc = warpgroup_mma(p, v, acc, is_async=True)
    else:
        wait_turn(ring, i, WHICH)
        mbarrier.wait(ring.k_full.index(slot), phase)
        s = products(q, ring.k.index(slot), kind)
        mbarrier.wait(ring.v_full.index(old), old_phase)
        v = ring.v.index(old).reshape([kind.BN, kind.DV])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        mbarrier.arrive(ring.turn.index((WHICH + 1) % kind.CONSUMERS), count=1)
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(ring.k_empty.index(slot), count=1)
    s = scores(s, row, key, rule, kind, MASKED)
    e, new_top = exponentials(s, top, rule, kind)
    alpha = gl.exp2(top - new_top)
    total = total * alpha + gl.sum(e, 1)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(ring.v_empty.index(old), count=1)
    if not kind.EARLY:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    p = gl.convert_layout(e.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
    old = slot
    old_phase = phase
    slot, phase = advance(slot, phase, kind.STAGES)
    return acc, alpha, total, new_top, p, old, old_phase, slot, phase


@gluon.jit
def clear(ring, limit, kind: gl.constexpr, WHICH: gl.constexpr):
    """Zero instead of the values from row `limit` of the first tile on: 0 times NaN is NaN.

    The first two consumers clear half of the tile each, and all wait for both.
    """
    HALF: gl.constexpr = kind.BN // 2
    WIDE: gl.constexpr = wide(kind.DV)
    if WHICH < 2:
        mbarrier.wait(ring.v_full.index(0), 0)
        values = ring.v.index(0).reshape([kind.BN, kind.DV]).slice(WHICH * HALF, HALF)
        v = values.load(WIDE)
        inside = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, WIDE)) < limit
        values.store(gl.where(inside[:, None], v, gl.zeros_like(v)))
        fence_async_shared()  # before the products read them
        mbarrier.arrive(ring.clean, count=1)
    mbarrier.wait(ring.clean, 0)


@gluon.jit
def consume(
    results, sink, place, rule, q_smem, q_full, ring, kind: gl.constexpr, WHICH: gl.constexpr
):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    row = place.query + WHICH * kind.BM
    q = q_smem.index(WHICH).reshape([kind.BM, kind.D])
    acc = gl.zeros([kind.BM, kind.DV], gl.float32, OUT)
    top = gl.full([kind.BM], LOWEST, gl.float32, ROW)
    top = gl.maximum(top, sink)  # a first score without a value; -inf if there is none
    total = gl.exp2(sink - top)

    # The first tile, which has no products of values before it.
    mbarrier.wait(q_full, 0)
    slot = place.tiles * 0
    phase = slot
    mbarrier.wait(ring.k_full.index(slot), phase)
    wait_turn(ring, slot, WHICH)
    s = products(q, ring.k.index(slot), kind)
    mbarrier.arrive(ring.turn.index((WHICH + 1) % kind.CONSUMERS), count=1)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(ring.k_empty.index(slot), count=1)
    key = (place.tile + place.tiles - 1) * kind.BN
    s = scores(s, row, key, rule, kind, True)
    e, new_top = exponentials(s, top, rule, kind)
    alpha = gl.exp2(top - new_top)
    total = total * alpha + gl.sum(e, 1)
    top = new_top
    p = gl.convert_layout(e.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
    if kind.BOUNDED:  # only the tile of the last keys crosses their end
        clear(ring, rule.keys - key, kind, WHICH)
    old = slot
    old_phase = phase
    slot, phase = advance(slot, phase, kind.STAGES)

    # Trips before `right` cross the end of the keys or the band's right edge, those from `left` on
    # its left edge.
    end = place.tile + place.tiles
    whole = rule.keys // kind.BN
    if kind.RIGHT:
        whole = gl.minimum(whole, gl.maximum(row + rule.high + 1, 0) // kind.BN)
    right = gl.minimum(gl.maximum(end - whole, 1), place.tiles)
    left = place.tiles
    if kind.LEFT:
        whole = gl.cdiv(gl.maximum(row + kind.BM - 1 + rule.low, 0), kind.BN)
        left = gl.minimum(gl.maximum(end - whole, right), place.tiles)
    for i in range(1, right):
        acc, alpha, total, top, p, old, old_phase, slot, phase = trip(
            acc, alpha, total, top, p, old, old_phase, slot, phase,
            i, q, row, place, rule, ring, kind, WHICH, True,
        )  # fmt: skip
    for i in range(right, left):
        acc, alpha, total, top, p, old, old_phase, slot, phase = trip(
            acc, alpha, total, top, p, old, old_phase, slot, phase,
            i, q, row, place, rule, ring, kind, WHICH, False,
        )  # fmt: skip
    if kind.LEFT:
        for i in range(left, place.tiles):
            acc, alpha, total, top, p, old, old_phase, slot, phase = trip(
                acc, alpha, total, top, p, old, old_phase, slot, phase,
                i, q, row, place, rule, ring, kind, WHICH, True,
            )  # fmt: skip

    mbarrier.wait(ring.v_full.index(old), old_phase)
    if kind.EARLY:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    v = ring.v.index(old).reshape([kind.BN, kind.DV])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(ring.v_empty.index(old), count=1)

    blind = total == 0.0
    inverse = gl.where(blind, 0.0, 1.0 / total)
    out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, OUT))[:, None]
    smem = results.smem.index(WHICH)
    tile = smem.reshape([kind.BM, kind.DV])
    tile.store(out.to(q.dtype))
    if kind.PACKED:  # the rows after these are another sequence's
        WIDE: gl.constexpr = wide(kind.DV)
        r = row + gl.arange(0, kind.BM, gl.SliceLayout(1, WIDE))[:, None]
        c = gl.arange(0, kind.DV, gl.SliceLayout(0, WIDE))[None, :]
        inside = (r < results.queries) & (c < results.width)
        gl.store(
            results.out_ptr + r.to(gl.int64) * results.stride + c, tile.load(WIDE), mask=inside
        )
    else:  # TMA cuts off the rows and columns that are not there
        fence_async_shared()
        tma.async_store(results.out, [place.batch, row, place.head, 0], smem)
    rows = row + gl.arange(0, kind.BM, ROW)
    lse = gl.where(blind, float("-inf"), (top + gl.log2(total)) * LN_2)
    gl.store(results.lse + rows, lse, mask=rows < results.queries)
    tma.store_wait(0)


SIZES = [
    "heads", "group", "planes", "seqlen_q", "seqlen_k", "query_tiles", "stride_slope", "eighth",
    "left", "right",
]  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attention_forward(
    lse_ptr,  # (batch, heads, seqlen_q), float32, contiguous; packed: (heads, total_q)
    out_ptr,  # (total_q, heads, head_dim_v), contiguous, if packed
    sink_ptr,  # (heads,) or None
    slopes_ptr,  # (batch or 1, heads), float32, or None
    key_lengths_ptr,  # (batch,) or None
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,  # (batch + 1,) or None
    seqused_q_ptr, seqused_k_ptr,  # (batch,) or None
    q_desc,  # of (batch, seqlen, heads, head_dim), like those of k, v and out; packed: batch 1
    k_desc,
    v_desc,
    o_desc,
    heads, group, planes,  # planes: batch * heads
    seqlen_q, seqlen_k,  # packed: total
    query_tiles, eighth,  # of head_dim_v
    stride_slope,  # of the batch
    left, right,  # of the window, if LEFT and RIGHT
    inner, scale,  # float32, as in Rule
    D: gl.constexpr,
    WIDTH: gl.constexpr,
    DV: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TOP_LEFT: gl.constexpr,
    SCALED: gl.constexpr,
    CAPPED: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a consumer's thread
):  # fmt: skip
    SLOPED: gl.constexpr = slopes_ptr is not None
    PACKED: gl.constexpr = cu_seqlens_q_ptr is not None
    BOUNDED: gl.constexpr = PACKED or key_lengths_ptr is not None
    kind: gl.constexpr = Kind(
        D,
        WIDTH,
        DV,
        CONSUMERS,
        BM,
        BN,
        STAGES,
        LEFT,
        RIGHT,
        SCALED,
        CAPPED,
        SLOPED,
        BOUNDED,
        PACKED,
        DV > 64 and WIDTH == D and not (LEFT or CAPPED or SLOPED),
    )
    dtype: gl.constexpr = q_desc.dtype

    # Under a right edge the last queries have the most keys: they begin first, those of all heads.
    pid = gl.program_id(0)
    if RIGHT:
        plane = pid % planes
        tile = query_tiles - 1 - pid // planes
    else:
        plane = pid // query_tiles
        tile = pid % query_tiles
    batch = plane // heads
    head = plane % heads
    query = tile * (CONSUMERS * BM)
    width = eighth * 8  # so that Triton stores 16 bytes at once

    # Its sequence, and the end of its keys.
    of_slopes = slopes_ptr
    if SLOPED:
        of_slopes += batch * stride_slope + head
    start_q = pid * 0
    start_k = start_q
    if PACKED:
        lse_ptr += head.to(gl.int64) * seqlen_q
        start_q, seqlen_q = length(cu_seqlens_q_ptr, seqused_q_ptr, batch)
        start_k, seqlen_k = length(cu_seqlens_k_ptr, seqused_k_ptr, batch)
        if query >= seqlen_q:
            return
        lse_ptr += start_q
        out_ptr += (start_q.to(gl.int64) * heads + head) * width
        batch = batch * 0
    else:
        lse_ptr += plane.to(gl.int64) * seqlen_q
    keys = seqlen_k
    if key_lengths_ptr is not None:
        keys = gl.minimum(keys, gl.maximum(gl.load(key_lengths_ptr + batch).to(gl.int32), 0))

    # Its tiles.
    corner = seqlen_k - seqlen_q
    shift = corner
    if TOP_LEFT:
        shift = corner * 0
    low = shift - left
    high = shift + right
    end = keys
    if RIGHT:
        end = gl.minimum(end, gl.maximum(query + CONSUMERS * BM + high, 0))
    first = start_q * 0
    if LEFT:
        first = gl.maximum(query + low, 0) // BN
    tiles = gl.maximum(gl.cdiv(end, BN) - first, 1)  # one is masked whole if no key is seen
    place = Place(batch, head, head // group, start_q, start_k, query, first, tiles)

    slope = scale * 0.0
    if SLOPED:
        slope = gl.load(of_slopes) * 1.4426950408889634
    sink = scale * 0.0 + float("-inf")
    if sink_ptr is not None:
        sink = gl.load(sink_ptr + head).to(gl.float32) * 1.4426950408889634
    rule = Rule(inner, scale, slope, corner, low, high, keys)

    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, BM, 1, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, DV], v_desc.layout)
    if D == DV:
        o_smem = q_smem  # which nobody reads any more then
    else:
        o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, BM, 1, DV], o_desc.layout)
    q_full = mbarrier.allocate_mbarrier()
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    turn = mbarrier.allocate_mbarrier(batch=CONSUMERS)
    clean = mbarrier.allocate_mbarrier()
    mbarrier.init(q_full, count=1)
    mbarrier.init(clean, count=2)  # the first two consumers
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()  # before the copies see the barriers
    ring = Ring(k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, clean)
    results = Results(lse_ptr, o_desc, o_smem, out_ptr, heads * width, width, seqlen_q)

    mbarrier.expect(q_full, CONSUMERS * BM * D * 2)
    for i in gl.static_range(CONSUMERS):
        token = start_q + query + i * BM
        tma.async_load(q_desc, [batch, token, head, 0], q_full, q_smem.index(i))
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (consume, (results, sink, place, rule, q_smem, q_full, ring, kind, 0)),
                (consume, (results, sink, place, rule, q_smem, q_full, ring, kind, 1)),
                (consume, (results, sink, place, rule, q_smem, q_full, ring, kind, 2)),
                (produce, (k_desc, v_desc, place, ring, kind)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (results, sink, place, rule, q_smem, q_full, ring, kind, 0)),
                (consume, (results, sink, place, rule, q_smem, q_full, ring, kind, 1)),
                (produce, (k_desc, v_desc, place, ring, kind)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


# --- launching ------------------------------------------------------------------------------------


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a registered call; lse float32.

    Raises:
        launch.CannotRun: no descriptor can be made of q, k or v.
    """
    out, lse = call.results(q, v)
    packed = extras.cu_seqlens_q is not None
    if packed:  # only the device knows which tokens no sequence has, or seqused leaves out
        out.zero_()
        lse.fill_(float("-inf"))
    q, k, v, o = (x[None] if packed else x for x in (q, k, v, out))
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, head_dim_v = k.shape[1], v.shape[3]
    longest_q, longest_k = seqlen_q, seqlen_k
    if extras.cu_seqlens_q is not None:
        batch = extras.cu_seqlens_q.shape[0] - 1
        longest_q = min(settings.max_seqlen_q, seqlen_q)
        longest_k = min(settings.max_seqlen_k, seqlen_k)
    slopes = extras.alibi_slopes
    crowded = settings.window_left >= 0 or settings.softcap > 0 or slopes is not None or packed
    tile = tiles.forward(head_dim, head_dim_v, crowded)
    rows, keys = tile.rows, tile.keys
    descriptors = [
        kernels.descriptor(x, [1, n, 1, d], name=name)
        for name, x, n, d in (
            ("q", q, rows, tile.d),
            ("k", k, keys, tile.d),
            ("v", v, keys, tile.dv),
            ("out", o, rows, tile.dv),
        )
    ]
    # Whoever sees this far sees all.
    sides = (min(n, max(longest_q, longest_k)) for n in settings[:2])
    inner, scale = 0.0, settings.softmax_scale
    if settings.softcap:
        cap = max(settings.softcap, 1e-20)
        inner, scale = 2 * LOG2_E * scale / cap, cap
    scale *= LOG2_E
    vectors = (
        extras.sink, slopes, extras.key_lengths, extras.cu_seqlens_q, extras.cu_seqlens_k,
        extras.seqused_q, extras.seqused_k,
    )  # fmt: skip
    query_tiles = -(-longest_q // (tile.consumers * rows))
    kernels.launch(
        attention_forward,
        (query_tiles * heads * batch,),
        lse, out, *(x if x is None else x.contiguous() for x in vectors), *descriptors,
        heads, heads // k.shape[2], batch * heads, seqlen_q, seqlen_k, query_tiles, head_dim_v // 8,
        0 if slopes is None or slopes.shape[0] == 1 else heads, *sides, float(inner), float(scale),
        D=tile.d, WIDTH=tile.width, DV=tile.dv, CONSUMERS=tile.consumers,
        BM=rows, BN=keys, STAGES=tile.stages,
        LEFT=settings.window_left >= 0, RIGHT=settings.window_right >= 0,
        TOP_LEFT=settings.top_left,
        SCALED=slopes is not None or scale < LEAST_SCALE,
        CAPPED=bool(settings.softcap), REGISTERS=tile.registers,
    )  # fmt: skip
    return out, lse
