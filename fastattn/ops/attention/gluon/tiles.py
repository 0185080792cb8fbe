"""Tiles of the Gluon kernels of attention, each with its reason."""

from __future__ import annotations

from typing import NamedTuple


class Forward(NamedTuple):
    """The tile of the forward.

    Attributes:
        d, dv: columns of q and k, and of v: powers of two, TMA fills what is missing with zeros.
        rows: queries of a consumer; a program has two of them.
        keys: of a tile.
        stages: tiles of keys and values in shared memory.
        registers: of a consumer's thread; the producer has 24, a multiprocessor 64 K.
    """

    d: int
    dv: int
    rows: int
    keys: int
    stages: int
    registers: int


# By the wider of d and dv: (keys, stages). Three stages of 128 keys at 128 columns and q's tile are
# 224 KB, without room for results of another width. At 256 columns the accumulator has half of the
# registers, and 128 keys do not fit.
_FORWARD = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
REGISTERS = 240


def box(width: int) -> int:
    """The columns of a tile of `width` columns: 64, of 128 bytes, is the swizzle's least."""
    return next(n for n in _FORWARD if width <= n)


def forward(head_dim: int, head_dim_v: int) -> Forward:
    """The tile of a call. head_dim and head_dim_v are at most 256."""
    d, dv = box(head_dim), box(head_dim_v)
    keys, stages = _FORWARD[max(d, dv)]
    return Forward(d, dv, 64, keys, stages, REGISTERS)
