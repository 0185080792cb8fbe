"""Attention backward on Hopper: five products in one pass over the scores.

A program has 128 keys of one key head, and passes over the queries that see them, of all heads of
its group. Its producer copies tiles of 64 queries by TMA into a ring; each of two consumers, a
warpgroup of its own, has 64 of the keys and computes

    S^T = K Q^T,  dP^T = V dO^T,  P = 2^(S - lse),  dS = P (dP - delta)
    dV += P^T dO,  dK += dS^T Q                    (P^T and dS^T from registers)
    dQ  = dS K                                     (of half of the columns, over all 128 keys)

with delta = rowsum(dO out) - dlse (Dao 2023, arXiv:2307.08691; `rows` computes it first). The
consumers exchange dS through shared memory, because dQ's sum is over the keys of both. A partition
of one warp adds dQ's tile to a float32 buffer by TMA reductions.

Equal bits in every run: a query tile's additions come in the order of the keys. A semaphore of
each tile counts the key tiles that have been added; a program adds when the count is its turn. It
waits only for programs of lower numbers, which a GPU starts first. It passes over the queries from
the last to the first, so that under a causal mask, where program n has 2 n trips less than program
0, a wait of n trips at the start costs no time in the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.ops.attention import sink
from fastattn.ops.attention.call import Extras, Learnt, Settings
from fastattn.ops.attention.gluon.forward import LOG2_E, advance
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import gluon as kernels
from fastattn.ops.common.gluon import mbarrier, tma

MAX_HEAD_DIM = 128  # at 256 columns dK and dV would take all registers
MAX_SEQLEN = 2**28  # positions are 32-bit, and so are four of them added
MAX_ROWS = 2**30  # of all heads, padded: a coordinate is 32-bit
MISSING = {
    "alibi_slopes": "no ALiBi",
    "key_lengths": "no key_lengths",
    "cu_seqlens_q": "no packed sequences",
}
KEYS = 128  # of a program
QUERIES = 64  # of a tile
STAGES = 2
REGISTERS = 240


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run the backward of a call that the forward ran."""
    if (reason := kernels.unavailable(problem.device, reduces=True)) is not None:
        return reason
    if (widest := max(problem.head_dim, problem.head_dim_v)) > MAX_HEAD_DIM:
        return f"the Gluon backward has head_dim up to {MAX_HEAD_DIM}, not {widest}"
    if problem.settings.softcap:
        return "the Gluon backward has no softcap"
    for name, what in MISSING.items():
        if name in problem.given:
            return f"the Gluon backward has {what}"
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_SEQLEN:
        return "the Gluon backward has sequences of up to 2^28 tokens"
    if problem.batch * problem.heads * (problem.seqlen_q + QUERIES) > MAX_ROWS:
        return "the Gluon backward has up to 2^30 rows of all heads"
    return None


# --- rows -----------------------------------------------------------------------------------------


@gluon.jit
def attention_rows(
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v), contiguous, like out
    out_ptr,
    lse_ptr,  # (batch, heads, seqlen_q), float32, contiguous, like dlse
    dlse_ptr,  # or None
    base2_ptr,  # (batch * heads, seqlen_q rounded up to tiles), float32
    delta_ptr,
    heads,
    seqlen_q,
    head_dim,
    D: gl.constexpr,
    BM: gl.constexpr,
):
    """delta and the LSE to base 2 of a tile of rows; an LSE of inf, so that P is 0, where no row is
    or it sees no key."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    tiles = gl.cdiv(seqlen_q, BM)
    plane = gl.program_id(0) // tiles
    rows = gl.program_id(0) % tiles * BM + gl.arange(0, BM, ROW)
    columns = gl.arange(0, D, gl.SliceLayout(0, TILE))
    token = (plane // heads).to(gl.int64) * seqlen_q + rows
    at = ((token * heads + plane % heads) * head_dim)[:, None] + columns[None, :]
    inside = (rows < seqlen_q)[:, None] & (columns < head_dim)[None, :]
    dout = gl.load(dout_ptr + at, mask=inside, other=0.0).to(gl.float32)
    out = gl.load(out_ptr + at, mask=inside, other=0.0).to(gl.float32)
    delta = gl.sum(dout * out, 1)
    line = plane.to(gl.int64) * seqlen_q + rows
    lse = gl.load(lse_ptr + line, mask=rows < seqlen_q, other=float("-inf"))
    if dlse_ptr is not None:
        delta -= gl.load(dlse_ptr + line, mask=rows < seqlen_q, other=0.0)
    blind = lse == float("-inf")
    padded = plane.to(gl.int64) * (tiles * BM) + rows
    gl.store(base2_ptr + padded, gl.where(blind, float("inf"), lse * 1.4426950408889634))
    gl.store(delta_ptr + padded, gl.where(blind, 0.0, delta))


# --- the pass -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The constants of a kernel."""

    D: gl.constexpr  # the box of q, k, v and dO: a power of two
    BM: gl.constexpr  # queries of a tile
    STAGES: gl.constexpr
    LEFT: gl.constexpr  # whether the band has this side
    RIGHT: gl.constexpr


class Ring(NamedTuple):
    """Shared memory of the queries, and its barriers."""

    q: Any
    dout: Any
    lse: Any
    delta: Any
    q_full: Any  # q and lse are there
    dout_full: Any  # dO and delta
    empty: Any  # both consumers have read them


class Exchange(NamedTuple):
    """Shared memory of dS and dQ, and its barriers."""

    ds: Any
    dq: Any  # (2, ...), a half of the columns each
    ds_full: Any  # both consumers have written
    ds_empty: Any  # both have read
    dq_full: Any
    dq_empty: Any  # its addition has read it


class Place(NamedTuple):
    """The part of the scores that a program has."""

    batch: Any
    head: Any  # the first query head
    heads: Any  # of q
    group: Any
    tile: Any  # of keys
    stop: Any  # after the last tile of queries
    trips: Any  # for each head
    whole: Any  # the first of them, in which each query sees each key
    query_tiles: Any
    seqlen_k: Any
    low: Any  # query i sees the keys from i + low
    high: Any  # to i + high


@gluon.jit
def visited(n, place):
    """(query head, tile of queries) of trip `n`: of all heads the whole tiles, then the others."""
    whole = place.group * place.whole
    if n < whole:
        group = n // place.whole
        trip = n % place.whole
    else:
        masked = place.trips - place.whole
        group = (n - whole) // masked
        trip = place.whole + (n - whole) % masked
    return place.head + group, place.stop - 1 - trip


@gluon.jit
def produce(q_desc, dout_desc, lse_desc, delta_desc, place, ring, kind: gl.constexpr):
    slot = place.tile * 0
    phase = slot + 1  # the ring begins empty
    for n in range(place.group * place.trips):
        head, tile = visited(n, place)
        plane = place.batch * place.heads + head
        query = tile * kind.BM
        line = (plane * place.query_tiles + tile) * kind.BM
        q_full = ring.q_full.index(slot)
        dout_full = ring.dout_full.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(q_full, kind.BM * kind.D * 2 + kind.BM * 4)
        tma.async_load(q_desc, [place.batch, query, head, 0], q_full, ring.q.index(slot))
        tma.async_load(lse_desc, [line], q_full, ring.lse.index(slot))
        mbarrier.expect(dout_full, kind.BM * kind.D * 2 + kind.BM * 4)
        tma.async_load(dout_desc, [place.batch, query, head, 0], dout_full, ring.dout.index(slot))
        tma.async_load(delta_desc, [line], dout_full, ring.delta.index(slot))
        slot, phase = advance(slot, phase, kind.STAGES)


@gluon.jit
def add(dq_desc, semaphores, place, exchange, kind: gl.constexpr):
    """Adds dQ's tiles to global memory, each when it is its turn."""
    phase = place.tile * 0
    for n in range(place.group * place.trips):
        head, tile = visited(n, place)
        plane = place.batch * place.heads + head
        semaphore = semaphores + (plane * place.query_tiles + tile)
        before = place.tile  # key tiles that add to this tile of queries before this one
        if kind.LEFT:
            before -= gl.maximum(tile * kind.BM + place.low, 0) // 128
        mbarrier.wait(exchange.dq_full, phase)
        while gl.atomic_add(semaphore, 0, sem="acquire", scope="gpu") != before:
            pass
        for half in gl.static_range(2):
            tma.async_atomic_add(
                dq_desc,
                [place.batch, tile * kind.BM, head, half * (kind.D // 2)],
                exchange.dq.index(half),
            )
        tma.store_wait(0)
        mbarrier.arrive(exchange.dq_empty, count=1)
        tma.store_wait(0, read_only=False)
        gl.barrier()  # the thread that waited and the one that releases may be two
        gl.atomic_add(semaphore, 1, sem="release", scope="gpu")
        phase ^= 1


@gluon.jit
def trip(
    dk, dv, slot, phase, turn, tile, k_smem, v_smem, scale2, place, ring, exchange,
    kind: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One tile of queries; `turn` is the parity of the trips before."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.BM, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.D // 2, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    zeros = gl.zeros([64, kind.BM], gl.float32, S)
    k = k_smem.slice(WHICH * 64, 64)
    v = v_smem.slice(WHICH * 64, 64)
    q = ring.q.index(slot).reshape([kind.BM, kind.D])
    dout = ring.dout.index(slot).reshape([kind.BM, kind.D])

    mbarrier.wait(ring.q_full.index(slot), phase)
    s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(ring.dout_full.index(slot), phase)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = ring.lse.index(slot).load(COLUMN)
    s = warpgroup_mma_wait(1, [s])
    p = gl.exp2(s * scale2 - lse[None, :])
    if MASKED:
        key = place.tile * 128 + WHICH * 64
        keys = (key + gl.arange(0, 64, gl.SliceLayout(1, S)))[:, None]
        queries = (tile * kind.BM + gl.arange(0, kind.BM, COLUMN))[None, :]
        seen = keys < place.seqlen_k
        if kind.LEFT:
            seen = seen & (keys >= queries + place.low)
        if kind.RIGHT:
            seen = seen & (keys <= queries + place.high)
        p = gl.where(seen, p, 0.0)
    dp = warpgroup_mma_wait(0, [dp])
    weights = gl.convert_layout(p.to(q.dtype), LEFT_OPERAND)
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    delta = ring.delta.index(slot).load(COLUMN)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    mbarrier.wait(exchange.ds_empty, turn ^ 1)
    exchange.ds.slice(WHICH * 64, 64).store(ds)
    fence_async_shared()
    mbarrier.arrive(exchange.ds_full, count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, LEFT_OPERAND), q, dk, is_async=True)
    mbarrier.wait(exchange.ds_full, turn)
    half = k_smem.slice(WHICH * (kind.D // 2), kind.D // 2, dim=1)
    none = gl.zeros([kind.BM, kind.D // 2], gl.float32, DQ)
    dq = warpgroup_mma(exchange.ds.permute((1, 0)), half, none, use_acc=False, is_async=True)
    dv, dk = warpgroup_mma_wait(1, [dv, dk])
    mbarrier.arrive(ring.empty.index(slot), count=1)
    dq = warpgroup_mma_wait(0, [dq])
    mbarrier.arrive(exchange.ds_empty, count=1)
    mbarrier.wait(exchange.dq_empty, turn ^ 1)
    exchange.dq.index(WHICH).reshape([kind.BM, kind.D // 2]).store(dq)
    fence_async_shared()
    mbarrier.arrive(exchange.dq_full, count=1)
    slot, phase = advance(slot, phase, kind.STAGES)
    return dk, dv, slot, phase, turn ^ 1


@gluon.jit
def consume(
    dk_ptr, dv_ptr, stride, head_dim, head_dim_v, scale, scale2, k4, v4, kv_full, place, ring,
    exchange, kind: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.D, 16])
    k_smem = k4.reshape([128, kind.D])
    v_smem = v4.reshape([128, kind.D])
    dk = gl.zeros([64, kind.D], gl.float32, OUT)
    dv = gl.zeros([64, kind.D], gl.float32, OUT)
    mbarrier.wait(kv_full, 0)
    slot = place.tile * 0
    phase = slot
    turn = slot
    whole = place.group * place.whole
    if not kind.LEFT:
        for _ in range(whole):
            dk, dv, slot, phase, turn = trip(
                dk, dv, slot, phase, turn, 0, k_smem, v_smem, scale2, place, ring, exchange, kind,
                WHICH, False,
            )  # fmt: skip
    for n in range(whole, place.group * place.trips):
        _, tile = visited(n, place)
        dk, dv, slot, phase, turn = trip(
            dk, dv, slot, phase, turn, tile, k_smem, v_smem, scale2, place, ring, exchange, kind,
            WHICH, True,
        )  # fmt: skip
    keys = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    columns = gl.arange(0, kind.D, gl.SliceLayout(0, OUT))[None, :]
    inside = (place.tile * 128 + keys < place.seqlen_k)[:, None]
    dtype: gl.constexpr = k4.dtype
    at = (keys * stride)[:, None]
    gl.store(
        dk_ptr + (at * head_dim + columns), (dk * scale).to(dtype),
        mask=inside & (columns < head_dim),
    )  # fmt: skip
    gl.store(
        dv_ptr + (at * head_dim_v + columns), dv.to(dtype), mask=inside & (columns < head_dim_v)
    )


@gluon.jit
def attention_backward(
    dk_ptr,  # (batch, seqlen_k, kv_heads, head_dim), contiguous
    dv_ptr,
    semaphores,  # int32 of (batch, heads, query tiles), 0
    q_desc,  # of (batch, seqlen, heads, head_dim), like those of k, v, dout and dq
    k_desc,
    v_desc,
    dout_desc,
    dq_desc,  # float32, 0; without the scale
    lse_desc,  # of attention_rows, as one dimension
    delta_desc,
    heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
    low, high,  # query i sees the keys i + low <= j <= i + high, if LEFT and RIGHT
    scale,
    scale2,  # to base 2
    D: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a consumer's thread
):  # fmt: skip
    kind: gl.constexpr = Kind(D, BM, STAGES, LEFT, RIGHT)
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [1, 128, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 128, 1, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], dout_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], delta_desc.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BM], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [128, BM], DS)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 1, BM, 1, D // 2], dq_desc.layout)
    kv_full = mbarrier.allocate_mbarrier()
    ds_full = mbarrier.allocate_mbarrier()
    ds_empty = mbarrier.allocate_mbarrier()
    dq_full = mbarrier.allocate_mbarrier()
    dq_empty = mbarrier.allocate_mbarrier()
    q_full = mbarrier.allocate_mbarrier(batch=STAGES)
    dout_full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)  # both consumers
    mbarrier.init(ds_empty, count=2)
    mbarrier.init(dq_full, count=2)
    mbarrier.init(dq_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()  # before the copies see the barriers
    ring = Ring(q_smem, dout_smem, lse_smem, delta_smem, q_full, dout_full, empty)
    exchange = Exchange(ds_smem, dq_smem, ds_full, ds_empty, dq_full, dq_empty)

    # Key tiles of one head one after another: they share its queries in the L2 cache.
    key_tiles = gl.cdiv(seqlen_k, 128)
    tile = gl.program_id(0) % key_tiles
    plane = gl.program_id(0) // key_tiles
    kv_head = plane % kv_heads
    batch = plane // kv_heads
    key = tile * 128
    end = gl.minimum(key + 128, seqlen_k)
    query_tiles = gl.cdiv(seqlen_q, BM)
    start = tile * 0
    stop = query_tiles
    if RIGHT:
        start = gl.minimum(gl.maximum(key - high, 0) // BM, query_tiles)
    if LEFT:  # the last key is seen up to the query end - 1 - low
        stop = gl.minimum(stop, gl.cdiv(gl.maximum(end - low, 0), BM))
    trips = gl.maximum(stop - start, 0)
    whole = tile * 0
    if not LEFT:
        if key + 128 <= seqlen_k:
            whole = trips
            if RIGHT:  # the first query sees the last key
                whole = gl.maximum(stop - gl.cdiv(gl.maximum(end - 1 - high, 0), BM), 0)
    group = heads // kv_heads
    place = Place(
        batch, kv_head * group, heads, group, tile, stop, trips, whole, query_tiles, seqlen_k,
        low, high,
    )  # fmt: skip
    token = (batch.to(gl.int64) * seqlen_k + key) * kv_heads + kv_head
    dk_ptr += token * head_dim
    dv_ptr += token * head_dim_v

    mbarrier.expect(kv_full, 2 * 128 * D * 2)
    tma.async_load(k_desc, [batch, key, kv_head, 0], kv_full, k_smem)
    tma.async_load(v_desc, [batch, key, kv_head, 0], kv_full, v_smem)
    gl.warp_specialize(
        [
            (consume, (dk_ptr, dv_ptr, kv_heads, head_dim, head_dim_v, scale, scale2, k_smem,
                       v_smem, kv_full, place, ring, exchange, kind, 0)),
            (consume, (dk_ptr, dv_ptr, kv_heads, head_dim, head_dim_v, scale, scale2, k_smem,
                       v_smem, kv_full, place, ring, exchange, kind, 1)),
            (produce, (q_desc, dout_desc, lse_desc, delta_desc, place, ring, kind)),
            (add, (dq_desc, semaphores, place, exchange, kind)),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip


# --- launching ------------------------------------------------------------------------------------


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Learnt,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, dbias, dsink), each shaped as its input and contiguous.

    dbias is empty, and dsink where `wanted` is False. A tensor that no descriptor can be made of is
    copied.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads, head_dim_v = v.shape[1:]
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    q, k, v, dout = (
        x if kernels.reads(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (q, k, v, dout)
    )
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    box = 64 if max(head_dim, head_dim_v) <= 64 else 128
    tiles = -(-seqlen_q // QUERIES)
    base2, delta = torch.empty(
        (2, batch * heads, tiles * QUERIES), dtype=torch.float32, device=q.device
    ).unbind()
    kernels.launch(
        attention_rows, (tiles * batch * heads,),
        dout, out, lse, None if dlse is None else dlse.contiguous(), base2, delta,
        heads, seqlen_q, head_dim_v, D=box, BM=QUERIES,
    )  # fmt: skip

    corner = 0 if settings.top_left else seqlen_k - seqlen_q
    left, right = (min(n, MAX_SEQLEN * 2) for n in (settings.window_left, settings.window_right))
    kernels.launch(
        attention_backward,
        (-(-seqlen_k // KEYS) * kv_heads * batch,),
        dk, dv, torch.zeros((batch, heads, tiles), dtype=torch.int32, device=q.device),
        kernels.descriptor(q, [1, QUERIES, 1, box]),
        kernels.descriptor(k, [1, KEYS, 1, box]),
        kernels.descriptor(v, [1, KEYS, 1, box]),
        kernels.descriptor(dout, [1, QUERIES, 1, box]),
        kernels.descriptor(sums, [1, QUERIES, 1, box // 2]),
        kernels.descriptor(base2.view(-1), [QUERIES], swizzle=0),
        kernels.descriptor(delta.view(-1), [QUERIES], swizzle=0),
        heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, corner - left, corner + right,
        float(settings.softmax_scale), float(settings.softmax_scale * LOG2_E),
        D=box, BM=QUERIES, STAGES=STAGES, LEFT=left >= 0, RIGHT=right >= 0, REGISTERS=REGISTERS,
    )  # fmt: skip

    dq = torch.mul(sums, settings.softmax_scale, out=q.new_empty(q.shape))
    dbias, dsink = q.new_empty((0,)), q.new_empty((0,))  # two: outputs may not alias
    if wanted.sink:
        assert extras.sink is not None
        of_rows = delta.view(batch, heads, -1)[..., :seqlen_q].contiguous()
        dsink = sink.gradient(lse, of_rows, extras.sink)
    return dq, dk, dv, dbias, dsink
