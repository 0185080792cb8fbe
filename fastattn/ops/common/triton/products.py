"""A tile of a matrix product, or of two with the same left side, and what finishing it takes.

Right sides are read as (k, n) views: a weight of either layout is the same kernel with other
strides. Any size; float16, bfloat16 and float32; sums in float32, float32 operands multiplied as
such (IEEE, no TF32). The launchers' half of it is at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.common import launch, tiles

# Offsets inside a tile are 32-bit; a tile has at most 128 rows (tiles.py).
MAX_COLUMNS = 2**31 // 128 - 1


@triton.jit
def tile_of_program(
    m_size, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """(row, column) of this program's tile: GROUP_M rows of tiles are walked column by column.

    For GROUP_M = 2:    0 2 4
                        1 3 5
                        6 8 10
                        7 9 11
    """
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    tiles_n = tl.cdiv(n_size, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    within = program % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def products(
    a_ptr,  # (m_size, k_size)
    b_ptr,  # (k_size, n_size)
    c_ptr,  # the same; None unless BOTH
    rows,  # (BLOCK_M,), all inside
    cols,  # (BLOCK_N,)
    stride_am,
    stride_bk,
    stride_bn,
    stride_ck,
    stride_cn,
    n_size,
    k_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BOTH: tl.constexpr,
):
    """The tiles a[rows] b[:, cols] and a[rows] c[:, cols] in float32; zeros beyond n_size."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_am + ks[None, :]
    b_ptrs = b_ptr + ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_c = acc
    if BOTH:
        c_ptrs = c_ptr + ks[:, None].to(tl.int64) * stride_ck
        c_ptrs += cols[None, :].to(tl.int64) * stride_cn
    for k in range(0, k_size, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(ks < k_size - k)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(
                b_ptrs, mask=(ks < k_size - k)[:, None] & (cols < n_size)[None, :], other=0.0
            )
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if BOTH:
            if EVEN_K and EVEN_N:
                c = tl.load(c_ptrs)
            else:
                c = tl.load(
                    c_ptrs, mask=(ks < k_size - k)[:, None] & (cols < n_size)[None, :], other=0.0
                )
            acc_c = tl.dot(a, c, acc_c, input_precision="ieee")
            c_ptrs += BLOCK_K * tl.cast(stride_ck, tl.int64)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * tl.cast(stride_bk, tl.int64)
    return acc, acc_c


# A tile's products are finished in strips of so many columns, one after the other: the activation's
# registers are those of a strip, beside the accumulators of a whole tile. With a gate there are
# twice as many values of an element at hand.
STRIP = tl.constexpr(64)
GATED_STRIP = tl.constexpr(32)


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


# --- what the launchers share -------------------------------------------------------------------


def tile_of(
    rows: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None = None
) -> tiles.Tile:
    """The tile of rows weight, (tokens, k) by (k, n), and of rows gate with it."""
    (tokens, k_size), n_size = rows.shape, weight.shape[1]
    long = 0
    for stride_k, stride_n in (w.stride() for w in (weight, gate) if w is not None):
        long |= stride_k if stride_n == 1 else stride_n if stride_k == 1 else 1
    return tiles.tile(
        launch.architecture(rows.device),
        rows.element_size(),
        tokens,
        n_size,
        launch.multiprocessors(rows.device),
        aligned=(k_size | n_size | rows.stride(0) | long) % 16 == 0,
        gated=gate is not None,
    )


def blocks(tile: tiles.Tile, n_size: int, k_size: int) -> dict[str, int | bool]:
    """What a tile is to a kernel, for a product of these sizes, which a model fixes."""
    return {
        "EVEN_N": n_size % tile.block_n == 0,
        "EVEN_K": k_size % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
