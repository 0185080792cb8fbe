"""A forward of attention as a subject for planted bugs: two consumers, a warp of TMA loads.

Causal or not, ragged lengths, batch, heads, grouped heads; masked and unmasked tiles apart. Q, K, V
and the output come by host descriptors of [B, S, H, D], boxes [1, rows, 1, D].
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
def ring(slot, phase, STAGES: gl.constexpr):
    slot += 1
    if slot == STAGES:
        slot = slot * 0
        phase ^= 1
    return slot, phase


@gluon.jit
def producer(
    k_box, v_box, b, h, tiles, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = tiles * 0
    phase = slot + 1
    for i in range(tiles):
        n = (tiles - 1 - i) * BN
        mbarrier.wait(k_empty.index(slot), phase)
        mbarrier.expect(k_full.index(slot), BN * D * 2)
        tma.async_load(k_box, [b, n, h, 0], k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), BN * D * 2)
        tma.async_load(v_box, [b, n, h, 0], v_full.index(slot), v_tiles.index(slot))
        slot, phase = ring(slot, phase, STAGES)


@gluon.jit
def masked(
    s, row, n, sq, sk, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr, S: gl.constexpr
):
    last = sk - 1
    if CAUSAL:
        last = gl.minimum(last, row + sk - sq)
    if n + BN - 1 > last:
        columns = n + gl.arange(0, BN, gl.SliceLayout(0, S))
        keep = columns[None, :] < sk
        if CAUSAL:
            rows = row + gl.arange(0, BM, gl.SliceLayout(1, S))
            keep = keep & (columns[None, :] <= rows[:, None] + (sk - sq))
        s = gl.where(keep, s, float("-inf"))
    return s


@gluon.jit
def trip(
    n, acc, total, top, p, old, old_phase, slot, phase, q, row, sq, sk, scale,
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    zero = gl.zeros([BM, BN], gl.float32, S)
    mbarrier.wait(k_full.index(slot), phase)
    k = k_tiles.index(slot).reshape([BN, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(old), old_phase)
    acc = warpgroup_mma(p, v_tiles.index(old).reshape([BN, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASK:
        s = masked(s, row, n, sq, sk, BM, BN, CAUSAL, S)
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    alpha = gl.exp2(top - new_top)
    weights = gl.exp2(s * scale - new_top[:, None])
    total = total * alpha + gl.sum(weights, 1)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(old), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, A))[:, None]
    p = gl.convert_layout(weights.to(gl.bfloat16), P)
    old = slot
    old_phase = phase
    slot, phase = ring(slot, phase, STAGES)
    return acc, total, new_top, p, old, old_phase, slot, phase


@gluon.jit
def consumer(
    o_box, lse, b, h, first, tiles, sq, sk, scale, q_tiles, q_full,
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WHICH: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    acc = gl.zeros([BM, D], gl.float32, A)
    zero = gl.zeros([BM, BN], gl.float32, S)
    top = gl.full([BM], -1e30, gl.float32, ROW)
    q = q_tiles.index(WHICH).reshape([BM, D])
    row = first + WHICH * BM
    mbarrier.wait(q_full, 0)
    slot = tiles * 0
    phase = slot
    n = (tiles - 1) * BN
    mbarrier.wait(k_full.index(slot), phase)
    k = k_tiles.index(slot).reshape([BN, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    s = masked(s, row, n, sq, sk, BM, BN, CAUSAL, S)
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    weights = gl.exp2(s * scale - new_top[:, None])
    total = gl.sum(weights, 1)
    top = new_top
    p = gl.convert_layout(weights.to(gl.bfloat16), P)
    old = slot
    old_phase = phase
    slot, phase = ring(slot, phase, STAGES)
    whole = sk // BN
    if CAUSAL:
        whole = gl.minimum(whole, gl.maximum(row + sk - sq + 1, 0) // BN)
    edge = gl.minimum(gl.maximum(tiles - whole, 1), tiles)
    for i in range(1, edge):
        acc, total, top, p, old, old_phase, slot, phase = trip(
            (tiles - 1 - i) * BN, acc, total, top, p, old, old_phase, slot, phase, q, row, sq, sk,
            scale, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, D, BM, BN, STAGES, CAUSAL, True,
        )  # fmt: skip
    for i in range(edge, tiles):
        acc, total, top, p, old, old_phase, slot, phase = trip(
            (tiles - 1 - i) * BN, acc, total, top, p, old, old_phase, slot, phase, q, row, sq, sk,
            scale, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, D, BM, BN, STAGES, CAUSAL, False,
        )  # fmt: skip
    mbarrier.wait(v_full.index(old), old_phase)
    acc = warpgroup_mma(p, v_tiles.index(old).reshape([BN, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(old), count=1)
    inverse = gl.where(total > 0, 1.0 / total, 0.0)
    out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, A))[:, None]
    # Through Q's tile, which nobody needs any more; the box ends with the rows of Q.
    q.store(out.to(gl.bfloat16))
    fence_async_shared()
    tma.async_store(o_box, [b, row, h, 0], q_tiles.index(WHICH))
    rows = row + gl.arange(0, BM, ROW)
    gl.store(lse + rows, gl.where(total > 0, top + gl.log2(total), float("-inf")), mask=rows < sq)
    tma.store_wait(0)


@gluon.jit
def kernel(
    q_box, k_box, v_box, o_box, lse, sq, sk, heads, group, scale,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 1, BM, 1, D], q_box.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BN, 1, D], k_box.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BN, 1, D], v_box.layout)
    q_full = mbarrier.allocate_mbarrier()
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    first = gl.program_id(0) * (2 * BM)
    h = gl.program_id(1)
    b = gl.program_id(2)
    lse += (b.to(gl.int64) * heads + h) * sq
    keys = sk
    if CAUSAL:
        keys = gl.minimum(sk, first + 2 * BM + sk - sq)
    tiles = gl.maximum(gl.cdiv(keys, BN), 1)
    mbarrier.expect(q_full, 2 * BM * D * 2)
    tma.async_load(q_box, [b, first, h, 0], q_full, q_tiles.index(0))
    tma.async_load(q_box, [b, first + BM, h, 0], q_full, q_tiles.index(1))
    rings = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    parts = (o_box, lse, b, h, first, tiles, sq, sk, scale, q_tiles, q_full)
    gl.warp_specialize(
        [
            (consumer, (*parts, *rings, D, BM, BN, STAGES, 0, CAUSAL)),
            (consumer, (*parts, *rings, D, BM, BN, STAGES, 1, CAUSAL)),
            (producer, (k_box, v_box, b, h // group, tiles, *rings, D, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
