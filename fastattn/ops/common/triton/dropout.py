"""Dropout inside of kernels: which elements of a tile are kept, made again wherever it is asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """Of one plane."""

    seed: Any  # int64
    plane: Any  # like i or a scalar
    threshold: Any  # of dropout.threshold
    inverse_keep: Any  # 1 / (1 - dropout_p)


@triton.jit
def keep_tile(
    x,  # Dropout
    i,  # row numbers: (BLOCK_M, 1), with COLUMNS_FIRST (1, BLOCK_M)
    first_column,  # the tile's first column, a multiple of 4
    BLOCK_N: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,  # the tile is columns by rows
):
    """Which elements of a tile dropout keeps; `ops/common/dropout.py` says by what rule."""
    quads = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    if COLUMNS_FIRST:
        quads = quads[:, None]
    else:
        quads = quads[None, :]
    zero = (i + quads) * 0
    row = (zero + i).to(tl.uint32)
    quad = (zero + quads).to(tl.uint32)
    planes = (zero + x.plane).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(x.seed, row, quad, planes, zero.to(tl.uint32))
    # (..., 2, 2) with word 2 a + b at [a, b], then next to each other along the columns.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if COLUMNS_FIRST:
        words = tl.permute(words, (0, 2, 3, 1))
        words = tl.reshape(words, (BLOCK_N, words.shape[3]))
    else:
        words = tl.reshape(words, (words.shape[0], BLOCK_N))
    return words.to(tl.int32, bitcast=True) >= x.threshold
