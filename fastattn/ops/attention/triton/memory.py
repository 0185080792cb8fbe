"""Tiles of memory: how kernels load, store and clear rows of (batch, token, head, width) tensors.

Offsets from a sequence's or a tile's first row are 32-bit, those of its first row 64-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor of (batch, token, head, width): rows of `width` elements."""

    ptr: Any
    batch: Any  # strides, in units of ALIGN elements
    token: Any
    head: Any


class Strip(NamedTuple):
    """The rows of one head from some token on."""

    base: Any  # pointer to the first row
    stride: Any  # from row to row, in elements


@triton.jit
def strip(
    x,  # Rows
    batch,  # in 64 bits, like head and token
    head,
    token,
    ALIGN: tl.constexpr,
):
    # ALIGN comes last, so that the compiler sees that rows begin where a wide access may.
    base = x.ptr + (batch * x.batch + head * x.head + token * x.token) * ALIGN
    return Strip(base, x.token * ALIGN)


@triton.jit
def load_rows(
    x,  # Strip
    first,  # number of the tile's first row
    local,  # (ROWS,) from 0 to ROWS - 1
    inside,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The (ROWS, BLOCK) tile of the rows from `first` on; see load_tile."""
    base = x.base + tl.cast(first, tl.int64) * x.stride
    return load_tile(base, local * x.stride, inside, WIDTH, BLOCK)


@triton.jit
def load_tile(
    base,
    offsets,  # (ROWS,) of the rows, in elements
    inside,  # (ROWS,) rows that exist, the others read as zero; None if all do
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A (ROWS, BLOCK_D) tile; columns past HEAD_DIM read as zero."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + (offsets[:, None] + columns[None, :])
    if inside is not None:
        exists = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            exists = exists & (columns < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=exists, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base,
    tile,  # (ROWS, BLOCK_D), cast to the pointer's type
    offsets,
    inside,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    exists = inside[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = base + (offsets[:, None] + columns[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exists)


@triton.jit
def clear_rows(
    ptr,  # (tokens, heads, head_dim), contiguous
    first,  # token
    end,
    tile,  # of `tiles`, which share the tokens
    tiles,
    heads,
    head,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zero a head's rows of the tokens from `first` to `end`, this tile's share of them."""
    columns = tl.arange(0, BLOCK_D)
    for n in range(first + tile * ROWS, end, tiles * ROWS):
        token = n + tl.arange(0, ROWS)
        pointers = ptr + ((token * heads + head) * HEAD_DIM)[:, None] + columns[None, :]
        exists = (token < end)[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(pointers, tl.zeros((ROWS, BLOCK_D), ptr.dtype.element_ty), mask=exists)
