"""Tiles of shared memory of which the last rows lie beyond a sequence."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.attention.gluon.arithmetic import wide


@gluon.jit
def clear(tile, limit, ROWS: gl.constexpr, D: gl.constexpr):
    """Zero instead of the rows from `limit` on: 0 times NaN is NaN."""
    WIDE: gl.constexpr = wide(D)
    held = tile.load(WIDE)
    inside = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE)) < limit
    tile.store(gl.where(inside[:, None], held, gl.zeros_like(held)))


@gluon.jit
def save(tile, to, token, limit, heads, eighth, ROWS: gl.constexpr, D: gl.constexpr):
    """The rows before `limit` to rows of one head of global memory, from row `token` on."""
    WIDE: gl.constexpr = wide(D)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    column = gl.arange(0, D, gl.SliceLayout(0, WIDE))[None, :]
    inside = (row < limit) & (column < eighth * 8)
    at = (token + row * heads) * (eighth * 8) + column
    gl.store(to + at, tile.load(WIDE), mask=inside)
