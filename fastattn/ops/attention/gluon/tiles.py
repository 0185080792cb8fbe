"""Tiles of the Gluon kernels of attention, each with its reason."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Forward(NamedTuple):
    """The tile of the forward.

    Attributes:
        d, dv: columns of q and k, and of v: powers of two, TMA fills what is missing with zeros.
        width: columns of q and k that are multiplied, d or three quarters of it.
        consumers: of a program.
        rows: queries of a consumer.
        keys: of a tile.
        stages: tiles of keys and values in shared memory.
        registers: of a consumer's thread; the producer has 24, a multiprocessor 64 K.
    """

    d: int
    width: int
    dv: int
    consumers: int
    rows: int
    keys: int
    stages: int
    registers: int


# By the wider of d and dv: (keys, stages). Three stages of 128 keys at 128 columns and q's tile are
# 224 KB, without room for results of another width. At 256 columns the accumulator has half of the
# registers, and 128 keys do not fit.
_FORWARD = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
# By consumers. At 64 columns of v the exponentials take longer than the products, and a third
# consumer hides more of them. Results of 128 columns need more registers than that.
REGISTERS = {2: 240, 3: 160}


def box(width: int) -> int:
    """The columns of a tile of `width` columns: 64, of 128 bytes, is the swizzle's least."""
    return next(n for n in _FORWARD if width <= n)


@functools.cache
def forward(head_dim: int, head_dim_v: int, crowded: bool) -> Forward:
    """The tile of a call.

    Args:
        head_dim, head_dim_v: at most 256.
        crowded: the call has a window's left edge, a softcap, ALiBi or packed sequences, which take
            registers.
    """
    d, dv = box(head_dim), box(head_dim_v)
    width = 3 * d // 4 if d > 64 and head_dim <= 3 * d // 4 else d
    keys, stages = _FORWARD[max(d, dv)]
    consumers = 2 if crowded or dv > 64 else 3
    return Forward(d, width, dv, consumers, 64, keys, stages, REGISTERS[consumers])
