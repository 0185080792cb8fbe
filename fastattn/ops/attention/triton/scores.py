"""What forward and both backward kernels share: tiles of memory, and which keys a row sees."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    base,  # first element of the tile's first row
    rows,  # (ROWS,) row numbers inside the tile
    stride,  # between rows, in elements
    row_limit,  # rows at or past it read as zero; ignored unless CHECK_ROWS
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """A (ROWS, BLOCK_D) tile; columns past HEAD_DIM read as zero."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if CHECK_ROWS:
        inside = (rows < row_limit)[:, None]
        if HEAD_DIM != BLOCK_D:
            inside = inside & (columns < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(
    base,
    tile,  # (ROWS, BLOCK_D), cast to the pointer's type
    rows,
    stride,
    row_limit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < row_limit)[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = base + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def hide(
    scores,  # (BLOCK_M, BLOCK_N), or transposed
    mask_base,  # the mask's element of the tile's first query and first key
    i,  # query numbers inside the tile, (BLOCK_M, 1), or transposed
    j,  # key numbers inside the tile, (1, BLOCK_N), or transposed
    stride_mask_q,
    stride_mask_k,
    rows_left,  # queries from the tile's first to the end
    keys_left,  # keys from the tile's first to the padding
    diagonal,  # the first query of the tile sees its keys j <= diagonal
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """`scores` with -inf where the key may not be seen.

    Tiles inside the causal triangle and the key limit (not BOUNDARY) see all but the mask.
    """
    if BOUNDARY:
        seen = j < keys_left
        if CAUSAL:
            seen = seen & (j <= i + diagonal)
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_MASK:
        pointers = mask_base + (i * stride_mask_q + j * stride_mask_k)
        seen = tl.load(pointers, mask=(i < rows_left) & (j < keys_left), other=0)
        scores = tl.where(seen != 0, scores, float("-inf"))
    return scores
