"""Products, exponentials and a layout of the Gluon forward."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.constexpr_function
def wide(columns):
    """A layout in which a thread has 16 bytes of a row, for four warps."""
    threads = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])


@gluon.jit
def products(q, k, kind: gl.constexpr):
    """Q K^T, asynchronous: of the first kind.WIDTH columns, the others are zero."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kind.BN, 16])
    FIRST: gl.constexpr = kind.D if kind.WIDTH == kind.D else kind.D // 2
    REST: gl.constexpr = kind.WIDTH - FIRST
    k = k.reshape([kind.BN, kind.D]).permute((1, 0))
    s = gl.zeros([kind.BM, kind.BN], gl.float32, S)
    s = warpgroup_mma(q.slice(0, FIRST, 1), k.slice(0, FIRST, 0), s, use_acc=False, is_async=True)
    if REST:
        s = warpgroup_mma(q.slice(FIRST, REST, 1), k.slice(FIRST, REST, 0), s, is_async=True)
    return s


@gluon.jit
def exponentials(s, top, rule, kind: gl.constexpr):
    """(2^(S - m'), m')."""
    if kind.SCALED:
        new_top = gl.maximum(top, gl.max(s, 1))
        return gl.exp2(s - new_top[:, None]), new_top
    else:
        new_top = gl.maximum(top, gl.max(s, 1) * rule.scale)
        return gl.exp2(s * rule.scale - new_top[:, None]), new_top
