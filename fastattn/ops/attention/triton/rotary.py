"""Rotary position embedding of a tile (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(
    x,  # (ROWS, BLOCK_D) as loaded
    base,
    offsets,  # (ROWS,) of the rows, in elements
    inside,  # (ROWS,) rows that exist
    positions,  # (ROWS,); those outside of the tables are cut to them
    cos_ptr,  # (rotary_positions, rotary_half), contiguous
    sin_ptr,
    rotary_half,
    rotary_positions,
    INTERLEAVED: tl.constexpr,  # pairs (2c, 2c + 1), else (c, c + rotary_half)
    BLOCK_D: tl.constexpr,
):
    """x with its first 2 * rotary_half columns turned, in float32, rounded to its dtype."""
    columns = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        partner = columns ^ 1
        pair = columns // 2
        sign = tl.where(columns % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(columns < rotary_half, columns + rotary_half, columns - rotary_half)
        pair = tl.where(columns < rotary_half, columns, columns - rotary_half)
        sign = tl.where(columns < rotary_half, -1.0, 1.0)
    exists = inside[:, None] & (columns < 2 * rotary_half)[None, :]
    other = tl.load(base + (offsets[:, None] + partner[None, :]), mask=exists, other=0.0)
    row = tl.maximum(tl.minimum(positions, rotary_positions - 1), 0).to(tl.int64)
    angle = row[:, None] * rotary_half + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=exists, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=exists, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * cos + sign[None, :] * other.to(tl.float32) * sin).to(x.dtype)
