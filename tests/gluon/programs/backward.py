"""A backward of attention as a subject for planted bugs: dQ, dK and dV of one head in one pass.

A program owns 128 keys, each of two consumers 64 of them. A consumer has S^T and dP^T, adds to dV
and dK with P^T and dS^T from registers, gives its dS to the other through shared memory, and
computes half of dQ's columns, which TMA adds to global memory. `lse` is in base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.ops.common.gluon import mbarrier, tma


@gluon.jit
def producer(
    q, do, lse, delta, start, sq, stride, q_tiles, do_tiles, lse_rows, delta_rows,
    q_full, q_empty, do_full, do_empty,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, QL: gl.constexpr, LL: gl.constexpr,
):  # fmt: skip
    lse_box = tma.make_tensor_descriptor(lse, [sq], [1], [BM], LL)
    delta_box = tma.make_tensor_descriptor(delta, [sq], [1], [BM], LL)
    q_box = tma.make_tensor_descriptor(q, [sq, D], [stride, 1], [BM, D], QL)
    do_box = tma.make_tensor_descriptor(do, [sq, D], [stride, 1], [BM, D], QL)
    slot = start * 0
    phase = slot + 1
    for m in range(start, sq, BM):
        mbarrier.wait(q_empty.index(slot), phase)
        mbarrier.expect(q_full.index(slot), BM * D * 2 + BM * 4)
        tma.async_load(lse_box, [m], q_full.index(slot), lse_rows.index(slot))
        tma.async_load(q_box, [m, 0], q_full.index(slot), q_tiles.index(slot))
        mbarrier.wait(do_empty.index(slot), phase)
        mbarrier.expect(do_full.index(slot), BM * D * 2 + BM * 4)
        tma.async_load(delta_box, [m], do_full.index(slot), delta_rows.index(slot))
        tma.async_load(do_box, [m, 0], do_full.index(slot), do_tiles.index(slot))
        slot += 1
        if slot == STAGES:
            slot = slot * 0
            phase ^= 1


@gluon.jit
def consumer(
    dq, dk, dv, first, start, sq, sk, stride, scale, scale2, k_tile, v_tile, kv_full,
    q_tiles, do_tiles, lse_rows, delta_rows, ds_tile, dq_tiles,
    q_full, q_empty, do_full, do_empty, ds_full, ds_empty,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WHICH: gl.constexpr, DQL: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dq_box = tma.make_tensor_descriptor(dq, [sq, D], [D, 1], [BM, D // 2], DQL)
    dk_sum = gl.zeros([64, D], gl.float32, A)
    dv_sum = gl.zeros([64, D], gl.float32, A)
    zero = gl.zeros([64, BM], gl.float32, S)
    zero_dq = gl.zeros([BM, D // 2], gl.float32, X)
    key = first + WHICH * 64
    keys = key + gl.arange(0, 64, gl.SliceLayout(1, S))
    my_k = k_tile.slice(WHICH * 64, 64)
    my_v = v_tile.slice(WHICH * 64, 64)
    my_ds = ds_tile.slice(WHICH * 64, 64)
    mbarrier.wait(kv_full, 0)
    slot = start * 0
    phase = slot
    turn = slot
    for m in range(start, sq, BM):
        mbarrier.wait(q_full.index(slot), phase)
        s = warpgroup_mma(
            my_k, q_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        mbarrier.wait(do_full.index(slot), phase)
        dp = warpgroup_mma(
            my_v, do_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        columns = m + gl.arange(0, BM, COLUMN)
        lse = lse_rows.index(slot).load(COLUMN)
        lse = gl.where(lse == float("-inf"), float("inf"), lse)
        delta = delta_rows.index(slot).load(COLUMN)
        s = warpgroup_mma_wait(1, [s])
        p = gl.exp2(s * scale2 - lse[None, :])
        if key + 64 > sk:
            p = gl.where(keys[:, None] < sk, p, 0.0)
        if CAUSAL:  # noqa: SIM102
            if key + 63 > m + sk - sq:
                p = gl.where(keys[:, None] <= columns[None, :] + (sk - sq), p, 0.0)
        dp = warpgroup_mma_wait(0, [dp])
        weights = gl.convert_layout(p.to(gl.bfloat16), P)
        dv_sum = warpgroup_mma(weights, do_tiles.index(slot), dv_sum, is_async=True)
        ds = (p * (dp - delta[None, :])).to(gl.bfloat16)
        mbarrier.wait(ds_empty, turn ^ 1)
        my_ds.store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full, count=1)
        dk_sum = warpgroup_mma(gl.convert_layout(ds, P), q_tiles.index(slot), dk_sum, is_async=True)
        mbarrier.wait(ds_full, turn)
        half = k_tile.slice(WHICH * (D // 2), D // 2, dim=1)
        dq_part = warpgroup_mma(
            ds_tile.permute((1, 0)), half, zero_dq, use_acc=False, is_async=True
        )
        dv_sum, dk_sum = warpgroup_mma_wait(1, [dv_sum, dk_sum])
        mbarrier.arrive(do_empty.index(slot), count=1)
        mbarrier.arrive(q_empty.index(slot), count=1)
        dq_part = warpgroup_mma_wait(0, [dq_part])
        mbarrier.arrive(ds_empty, count=1)
        tma.store_wait(0)
        dq_tiles.index(WHICH).store(dq_part * scale)
        fence_async_shared()
        tma.async_atomic_add(dq_box, [m, WHICH * (D // 2)], dq_tiles.index(WHICH))
        turn ^= 1
        slot += 1
        if slot == STAGES:
            slot = slot * 0
            phase ^= 1
    rows = key + gl.arange(0, 64, gl.SliceLayout(1, A))
    at = rows[:, None] * stride + gl.arange(0, D, gl.SliceLayout(0, A))[None, :]
    gl.store(dk + at, (dk_sum * scale).to(gl.bfloat16), mask=rows[:, None] < sk)
    gl.store(dv + at, dv_sum.to(gl.bfloat16), mask=rows[:, None] < sk)
    tma.store_wait(0)


@gluon.jit
def kernel(
    q, k, v, do, dq, dk, dv, lse, delta, sq, sk, stride, scale, scale2,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    QL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], gl.bfloat16)
    KL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], gl.bfloat16)
    SL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BM], gl.bfloat16)
    DQL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D // 2], gl.float32)
    LL: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=1)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [128, D], KL)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [128, D], KL)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, D], QL)
    do_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, D], QL)
    lse_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BM], LL)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BM], LL)
    ds_tile = gl.allocate_shared_memory(gl.bfloat16, [128, BM], SL)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, BM, D // 2], DQL)
    kv_full = mbarrier.allocate_mbarrier()
    ds_full = mbarrier.allocate_mbarrier()
    ds_empty = mbarrier.allocate_mbarrier()
    q_full = mbarrier.allocate_mbarrier(batch=STAGES)
    q_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    do_full = mbarrier.allocate_mbarrier(batch=STAGES)
    do_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(ds_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    fence_async_shared()
    first = gl.program_id(0) * 128
    start = first * 0
    if CAUSAL:
        start = gl.minimum(gl.maximum(first - (sk - sq), 0) // BM * BM, sq)
    k_box = tma.make_tensor_descriptor(k, [sk, D], [stride, 1], [128, D], KL)
    v_box = tma.make_tensor_descriptor(v, [sk, D], [stride, 1], [128, D], KL)
    mbarrier.expect(kv_full, 2 * 128 * D * 2)
    tma.async_load(k_box, [first, 0], kv_full, k_tile)
    tma.async_load(v_box, [first, 0], kv_full, v_tile)
    rings = (q_tiles, do_tiles, lse_rows, delta_rows)
    turns = (q_full, q_empty, do_full, do_empty)
    parts = (dq, dk, dv, first, start, sq, sk, stride, scale, scale2, k_tile, v_tile, kv_full)
    shared = (*parts, *rings, ds_tile, dq_tiles, *turns, ds_full, ds_empty, D, BM, STAGES, CAUSAL)
    gl.warp_specialize(
        [
            (consumer, (*shared, 0, DQL)),
            (consumer, (*shared, 1, DQL)),
            (
                producer,
                (q, do, lse, delta, start, sq, stride, *rings, *turns, D, BM, STAGES, QL, LL),
            ),
        ],
        [4, 1],
        [240, 24],
    )
