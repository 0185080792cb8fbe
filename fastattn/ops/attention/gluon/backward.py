"""Attention backward on Hopper: five products in one pass over the scores.

A program has 128 keys of one key head, and passes over the queries that see them, of all heads of
its group. Its producer copies tiles of 64 queries by TMA into a ring; each of two consumers, a
warpgroup of its own, has 64 of the keys and computes

    S^T = K Q^T,  dP^T = V dO^T,  P = 2^(S - lse),  dS = P (dP - delta)
    dV += P^T dO,  dK += dS^T Q                    (P^T and dS^T from registers)
    dQ  = dS K                                     (of half of the columns, over all 128 keys)

with delta = rowsum(dO out) - dlse (Dao 2023, arXiv:2307.08691; `rows.py` computes it first). The
consumers exchange dS through shared memory, because dQ's sum is over the keys of both. A partition
of one warp adds dQ's tile to a float32 buffer by TMA reductions.

Equal bits in every run: a query tile's additions come in the order of the keys. A semaphore of
each tile counts the key tiles that have been added; a program adds when the count is its turn. It
waits only for programs of lower numbers, which a GPU starts first. It passes over the queries from
the last to the first, so that under a causal mask, where program n has 2 n trips less than program
0, a wait of n trips at the start costs no time in the end. With `deterministic=False` there are no
semaphores, and additions come in any order.

TMA reads whole tiles, also what lies after a sequence and may be NaN. Consumers zero these rows in
shared memory, and the LSE of such a query is inf: then no product has a NaN, and its P is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.ops.attention import sink
from fastattn.ops.attention.call import Extras, Learnt, Settings
from fastattn.ops.attention.gluon import rows
from fastattn.ops.attention.gluon.bounds import clear, save
from fastattn.ops.attention.gluon.forward import LOG2_E, advance
from fastattn.ops.attention.gluon.rows import QUERIES
from fastattn.ops.attention.gluon.scores import (
    Kind,
    Lengths,
    Rule,
    Sizes,
    place_of_program,
    probabilities,
    visited,
)
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import gluon as kernels
from fastattn.ops.common.gluon import mbarrier, tma

MAX_HEAD_DIM = 128
MAX_SEQLEN = 2**28  # positions are 32-bit, and so are four of them added
MAX_ROWS = 2**30  # of all heads, padded: a coordinate is 32-bit
KEYS = 128  # of a program
STAGES = 2
REGISTERS = 240
OPAQUE = gl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run the backward of a call that the forward ran."""
    if (reason := kernels.unavailable(problem.device, reduces=True)) is not None:
        return reason
    if (widest := max(problem.head_dim, problem.head_dim_v)) > MAX_HEAD_DIM:
        return f"the Gluon backward has registers for head_dim up to {MAX_HEAD_DIM}, not {widest}"
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_SEQLEN:
        return "the Gluon backward has sequences of up to 2^28 tokens"
    if problem.batch * problem.heads * (problem.seqlen_q + QUERIES) > MAX_ROWS:
        return "the Gluon backward has up to 2^30 rows of all heads"
    return None


class Ring(NamedTuple):
    """Shared memory of the queries, and its barriers."""

    q: Any
    dout: Any
    lse: Any
    delta: Any
    q_full: Any  # q and lse are there
    dout_full: Any  # dO and delta
    empty: Any  # both consumers have read them
    clean: Any  # both have zeroed what is beyond the queries, if PACKED


class Exchange(NamedTuple):
    """Shared memory of dS and dQ, and its barriers."""

    ds: Any
    dq: Any  # (2, ...), a half of the columns each
    ds_full: Any  # both consumers have written
    ds_empty: Any  # both have read
    dq_full: Any
    dq_empty: Any  # its addition has read it


class Gradients(NamedTuple):
    """Where dK and dV go."""

    dk: Any  # descriptor
    dv: Any
    dk_ptr: Any  # if PACKED
    dv_ptr: Any
    heads: Any  # of k
    eighth: Any  # of head_dim
    eighth_v: Any
    scale: Any


@gluon.jit
def produce(q_desc, dout_desc, lse_desc, delta_desc, place, ring, kind: gl.constexpr):
    slot = place.tile * 0
    phase = slot + 1  # the ring begins empty
    for n in range(place.trips):
        member, tile = visited(n, place)
        head = place.head + member
        query = place.start_q + tile * kind.BM
        line = (place.rows + member * place.tiles + tile) * kind.BM
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
    """Adds dQ's tiles to global memory, each when it is its turn, if there are turns."""
    phase = place.tile * 0
    for n in range(place.trips):
        member, tile = visited(n, place)
        mbarrier.wait(exchange.dq_full, phase)
        if semaphores is not None:
            semaphore = semaphores + (place.rows + member * place.tiles + tile)
            before = place.tile  # key tiles that add to this tile of queries before this one
            if kind.LEFT:
                before -= gl.maximum(tile * kind.BM + place.low, 0) // 128
            while gl.atomic_add(semaphore, 0, sem="acquire", scope="gpu") != before:
                pass
        row = place.start_sums + tile * kind.BM
        head = place.head + member
        for half in gl.static_range(2):
            column = half * (kind.D // 2)
            tma.async_atomic_add(dq_desc, [place.batch, row, head, column], exchange.dq.index(half))
        tma.store_wait(0)
        mbarrier.arrive(exchange.dq_empty, count=1)
        if semaphores is not None:
            tma.store_wait(0, read_only=False)
            gl.barrier()  # the thread that waited and the one that releases may be two
            gl.atomic_add(semaphore, 1, sem="release", scope="gpu")
        phase ^= 1


@gluon.jit
def clear_queries(slot, phase, n, place, ring, kind: gl.constexpr, WHICH: gl.constexpr):
    """Zero instead of the rows beyond the queries: half by each consumer, which waits for both."""
    HALF: gl.constexpr = kind.BM // 2
    limit = place.queries - (place.stop - 1) * kind.BM - WHICH * HALF
    mbarrier.wait(ring.q_full.index(slot), phase)
    q = ring.q.index(slot).reshape([kind.BM, kind.D])
    clear(q.slice(WHICH * HALF, HALF), limit, HALF, kind.D)
    mbarrier.wait(ring.dout_full.index(slot), phase)
    dout = ring.dout.index(slot).reshape([kind.BM, kind.D])
    clear(dout.slice(WHICH * HALF, HALF), limit, HALF, kind.D)
    fence_async_shared()  # before the products read them
    mbarrier.arrive(ring.clean, count=1)
    mbarrier.wait(ring.clean, n & 1)


@gluon.jit
def trip(
    dk, dv, slot, phase, n, k_smem, v_smem, place, rule, ring, exchange,
    kind: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One tile of queries of one head."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.BM, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.D // 2, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    LATE: gl.constexpr = kind.CAPPED or kind.SLOPED  # registers for dP and delta: when P needs none
    zeros = gl.zeros([64, kind.BM], gl.float32, S)
    # 0, which the compiler does not know. Descriptors of constant addresses Triton 3.8 has computed
    # before the loop and spilled; these take a few uniform additions in each trip.
    zero = slot // kind.STAGES
    turn = slot  # the parity of the trips before: there are two slots
    address = zero if OPAQUE else 0
    k_smem = k_smem.index(address).reshape([128, kind.D])
    v_smem = v_smem.index(address).reshape([128, kind.D])
    ds_smem = exchange.ds.index(address)
    k = k_smem.slice(WHICH * 64, 64)
    v = v_smem.slice(WHICH * 64, 64)
    q = ring.q.index(slot).reshape([kind.BM, kind.D])
    dout = ring.dout.index(slot).reshape([kind.BM, kind.D])

    mbarrier.wait(ring.q_full.index(slot), phase)
    s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = ring.lse.index(slot).load(COLUMN)
    mbarrier.wait(ring.dout_full.index(slot), phase)
    if not LATE:
        dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0 if LATE else 1, [s])
    p, slant = probabilities(s, lse, n, zero, place, rule, kind, WHICH, MASKED)
    if LATE:
        dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    weights = gl.convert_layout(p.to(q.dtype), LEFT_OPERAND)
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    if not LATE:
        delta = ring.delta.index(slot).load(COLUMN)
    dp = warpgroup_mma_wait(1, [dp])
    if LATE:
        delta = ring.delta.index(slot).load(COLUMN)
    ds = (slant * (dp - delta[None, :])).to(q.dtype)
    mbarrier.wait(exchange.ds_empty, turn ^ 1)
    ds_smem.slice(WHICH * 64, 64).store(ds)
    fence_async_shared()
    mbarrier.arrive(exchange.ds_full, count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, LEFT_OPERAND), q, dk, is_async=True)
    mbarrier.wait(exchange.ds_full, turn)
    half = k_smem.slice(WHICH * (kind.D // 2), kind.D // 2, dim=1)
    none = gl.zeros([kind.BM, kind.D // 2], gl.float32, DQ)
    dq = warpgroup_mma(ds_smem.permute((1, 0)), half, none, use_acc=False, is_async=True)
    dv, dk = warpgroup_mma_wait(1, [dv, dk])
    mbarrier.arrive(ring.empty.index(slot), count=1)
    dq = warpgroup_mma_wait(0, [dq])
    mbarrier.arrive(exchange.ds_empty, count=1)
    mbarrier.wait(exchange.dq_empty, turn ^ 1)
    exchange.dq.index(WHICH).reshape([kind.BM, kind.D // 2]).store(dq)
    fence_async_shared()
    mbarrier.arrive(exchange.dq_full, count=1)
    slot, phase = advance(slot, phase, kind.STAGES)
    return dk, dv, slot, phase


@gluon.jit
def consume(
    gradients, k_smem, v_smem, kv_full, place, rule, ring, exchange,
    kind: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.D, 16])
    dk = gl.zeros([64, kind.D], gl.float32, OUT)
    dv = gl.zeros([64, kind.D], gl.float32, OUT)
    mbarrier.wait(kv_full, 0)
    slot = place.tile * 0
    phase = slot
    if kind.BOUNDED:
        keys = place.keys - place.tile * 128 - WHICH * 64
        if keys < 64:  # `ds_full` tells the other consumer
            k = k_smem.index(0).reshape([128, kind.D])
            v = v_smem.index(0).reshape([128, kind.D])
            clear(k.slice(WHICH * 64, 64), keys, 64, kind.D)
            clear(v.slice(WHICH * 64, 64), keys, 64, kind.D)
            fence_async_shared()
            gl.barrier()  # a product reads what another warp has cleared
    if kind.PACKED or kind.LEFT:
        for n in range(place.first):
            if kind.PACKED:
                if n < place.ragged:
                    clear_queries(slot, phase, n, place, ring, kind, WHICH)
            dk, dv, slot, phase = trip(
                dk, dv, slot, phase, n, k_smem, v_smem, place, rule, ring, exchange, kind,
                WHICH, True,
            )  # fmt: skip
    for n in range(place.first, place.whole):
        dk, dv, slot, phase = trip(
            dk, dv, slot, phase, n, k_smem, v_smem, place, rule, ring, exchange, kind,
            WHICH, False,
        )  # fmt: skip
    for n in range(gl.maximum(place.first, place.whole), place.trips):
        dk, dv, slot, phase = trip(
            dk, dv, slot, phase, n, k_smem, v_smem, place, rule, ring, exchange, kind,
            WHICH, True,
        )  # fmt: skip

    dk *= gradients.scale
    if kind.BOUNDED and not kind.PACKED:  # NaN of a query is not a hidden key's
        key = place.tile * 128 + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
        inside = (key < place.keys)[:, None]
        dk = gl.where(inside, dk, 0.0)
        dv = gl.where(inside, dv, 0.0)
    mbarrier.wait(exchange.ds_empty, slot ^ 1)  # no product reads the ring any more
    dk4 = ring.q.index(WHICH)
    dv4 = ring.dout.index(WHICH)
    dk_smem = dk4.reshape([64, kind.D])
    dv_smem = dv4.reshape([64, kind.D])
    dk_smem.store(dk.to(k_smem.dtype))
    dv_smem.store(dv.to(k_smem.dtype))
    key = place.tile * 128 + WHICH * 64
    if kind.PACKED:  # the rows after these are another sequence's
        x = gradients
        token = (place.start_k + key).to(gl.int64) * x.heads + place.kv_head
        save(dk_smem, x.dk_ptr, token, place.keys - key, x.heads, x.eighth, 64, kind.D)
        save(dv_smem, x.dv_ptr, token, place.keys - key, x.heads, x.eighth_v, 64, kind.D)
    else:  # TMA cuts off the rows and columns that are not there
        fence_async_shared()
        tma.async_store(gradients.dk, [place.batch, key, place.kv_head, 0], dk4)
        tma.async_store(gradients.dv, [place.batch, key, place.kv_head, 0], dv4)
        tma.store_wait(0)


SIZES = [
    "heads", "kv_heads", "seqlen_q", "seqlen_k", "key_tiles", "tiles", "eighth", "eighth_v",
    "stride_slope", "left", "right",
]  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attention_backward(
    dk_ptr,  # (total_k, kv_heads, head_dim), contiguous, if packed
    dv_ptr,
    semaphores,  # int32, of all tiles of rows, 0; None: dQ is added to in any order
    slopes_ptr,  # (batch or 1, heads), float32, or None
    key_lengths_ptr,  # (batch,) or None
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,  # (batch + 1,) or None
    seqused_q_ptr, seqused_k_ptr,  # (batch,) or None
    q_desc,  # of (batch, seqlen, heads, head_dim), like those of k, v, dout, dk and dv
    k_desc,
    v_desc,
    dout_desc,
    dk_desc,
    dv_desc,
    dq_desc,  # float32, 0; without the scale; packed: of rows of tiles, as rows.py says
    lse_desc,  # of attention_rows, as one dimension
    delta_desc,
    heads, kv_heads,
    seqlen_q, seqlen_k,  # packed: total
    key_tiles,  # of the longest sequence
    tiles,  # of rows of a head
    eighth, eighth_v,  # of head_dim and head_dim_v
    stride_slope,  # of the batch
    left, right,  # of the window, if LEFT and RIGHT
    scale,
    scale2,  # to base 2, if CAPPED 2 / cap of it
    cap,  # to base 2
    D: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TOP_LEFT: gl.constexpr,
    CAPPED: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a consumer's thread
):  # fmt: skip
    SLOPED: gl.constexpr = slopes_ptr is not None
    PACKED: gl.constexpr = cu_seqlens_q_ptr is not None
    BOUNDED: gl.constexpr = PACKED or key_lengths_ptr is not None
    kind: gl.constexpr = Kind(D, BM, STAGES, LEFT, RIGHT, CAPPED, SLOPED, BOUNDED, PACKED)
    gl.static_assert(BM == 64 and STAGES == 2, "dK and dV leave through the ring: 64 keys a slot")
    dtype: gl.constexpr = q_desc.dtype

    sizes = Sizes(heads, kv_heads, seqlen_q, seqlen_k, key_tiles, tiles, left, right)
    lengths = Lengths(
        key_lengths_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_q_ptr, seqused_k_ptr
    )
    place = place_of_program(sizes, lengths, TOP_LEFT, kind)
    key = place.tile * 128
    if PACKED:
        if key >= place.keys:  # a shorter sequence
            return
    slopes = slopes_ptr
    if SLOPED:
        slopes += place.sequence * stride_slope + place.head
    rule = Rule(scale2, cap, slopes)
    gradients = Gradients(dk_desc, dv_desc, dk_ptr, dv_ptr, kv_heads, eighth, eighth_v, scale)

    k_smem = gl.allocate_shared_memory(dtype, [1, 1, 128, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, 128, 1, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D], dout_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], delta_desc.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BM], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [1, 128, BM], DS)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 1, BM, 1, D // 2], dq_desc.layout)
    kv_full = mbarrier.allocate_mbarrier()
    ds_full = mbarrier.allocate_mbarrier()
    ds_empty = mbarrier.allocate_mbarrier()
    dq_full = mbarrier.allocate_mbarrier()
    dq_empty = mbarrier.allocate_mbarrier()
    clean = mbarrier.allocate_mbarrier()
    q_full = mbarrier.allocate_mbarrier(batch=STAGES)
    dout_full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)  # both consumers
    mbarrier.init(ds_empty, count=2)
    mbarrier.init(dq_full, count=2)
    mbarrier.init(dq_empty, count=1)
    mbarrier.init(clean, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()  # before the copies see the barriers
    ring = Ring(q_smem, dout_smem, lse_smem, delta_smem, q_full, dout_full, empty, clean)
    exchange = Exchange(ds_smem, dq_smem, ds_full, ds_empty, dq_full, dq_empty)

    mbarrier.expect(kv_full, 2 * 128 * D * 2)
    tma.async_load(
        k_desc, [place.batch, place.start_k + key, place.kv_head, 0], kv_full, k_smem.index(0)
    )
    tma.async_load(
        v_desc, [place.batch, place.start_k + key, place.kv_head, 0], kv_full, v_smem.index(0)
    )
    gl.warp_specialize(
        [
            (consume, (gradients, k_smem, v_smem, kv_full, place, rule, ring, exchange, kind, 0)),
            (consume, (gradients, k_smem, v_smem, kv_full, place, rule, ring, exchange, kind, 1)),
            (produce, (q_desc, dout_desc, lse_desc, delta_desc, place, ring, kind)),
            (add, (dq_desc, semaphores, place, exchange, kind)),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )


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
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    box = 64 if max(head_dim, head_dim_v) <= 64 else 128
    tiles = rows.tiles(q, extras, settings)
    base2, delta = rows.before(dout, dlse, out, lse, tiles, extras, box)
    starts = extras.cu_seqlens_q
    packed = starts is not None  # then not every token is a sequence's
    dk, dv = (x.new_zeros(x.shape) if packed else x.new_empty(x.shape) for x in (k, v))
    q4, k4, v4, dout4, dk4, dv4 = (x[None] if packed else x for x in (q, k, v, dout, dk, dv))
    batch, seqlen_q, heads, _ = q4.shape
    seqlen_k, kv_heads = k4.shape[1:3]
    of_sums = batch, tiles.head * QUERIES if packed else seqlen_q, heads, head_dim
    sums = torch.zeros(of_sums, dtype=torch.float32, device=q.device)
    longest = seqlen_k
    if starts is not None:
        batch, longest = starts.shape[0] - 1, min(settings.max_seqlen_k, seqlen_k)
    key_tiles = -(-longest // KEYS)
    semaphores = None
    if settings.deterministic:
        semaphores = torch.zeros((tiles.all,), dtype=torch.int32, device=q.device)
    sides = (min(n, MAX_SEQLEN) for n in settings[:2])  # whoever sees this far sees all
    scale, cap = settings.softmax_scale * LOG2_E, 0.0
    if settings.softcap:
        cap = max(settings.softcap, 1e-20)
        scale, cap = 2 * scale / cap, cap * LOG2_E
    slopes = extras.alibi_slopes
    vectors = (
        slopes, extras.key_lengths, extras.cu_seqlens_q, extras.cu_seqlens_k, extras.seqused_q,
        extras.seqused_k,
    )  # fmt: skip
    of_queries, of_keys, of_half = ([1, n, 1, box] for n in (QUERIES, KEYS, KEYS // 2))
    boxes = of_queries, of_keys, of_keys, of_queries
    kernels.launch(
        attention_backward,
        (key_tiles * kv_heads * batch,),
        dk, dv, semaphores, *(x if x is None else x.contiguous() for x in vectors),
        *map(kernels.descriptor_or_copy, (q4, k4, v4, dout4), boxes),
        kernels.descriptor(dk4, of_half), kernels.descriptor(dv4, of_half),
        kernels.descriptor(sums, [1, QUERIES, 1, box // 2]),
        *(kernels.descriptor(x, [QUERIES], swizzle=0) for x in (base2, delta)),
        heads, kv_heads, seqlen_q, seqlen_k, key_tiles, tiles.head, head_dim // 8, head_dim_v // 8,
        0 if slopes is None or slopes.shape[0] == 1 else heads, *sides,
        float(settings.softmax_scale), float(scale), float(cap),
        D=box, BM=QUERIES, STAGES=STAGES, LEFT=settings.window_left >= 0,
        RIGHT=settings.window_right >= 0, TOP_LEFT=settings.top_left,
        CAPPED=bool(settings.softcap), REGISTERS=REGISTERS,
    )  # fmt: skip

    dq = rows.after(sums, q, settings.softmax_scale, tiles, extras, box)
    dbias, dsink = q.new_empty((0,)), q.new_empty((0,))  # two: outputs may not alias
    if wanted.sink:
        assert extras.sink is not None
        lines = (heads, -1) if packed else (batch, heads, -1)
        dsink = sink.gradient((base2 / LOG2_E).view(lines), delta, extras.sink)
    return dq, dk, dv, dbias, dsink
