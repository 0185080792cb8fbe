"""The tile of the derivative's kernel; that of the product is in ops/common/tiles.py.

Nothing here is measured on a GPU yet. The kernel moves memory: a thread has 32 elements, four loads
of 16 bytes of 16-bit tensors. More rows would make fewer partial sums (4 bytes for `block_m`
elements of a column), but a tensor of few tokens would leave multiprocessors idle.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """`block_m` tokens by `block_n` features of one program."""

    block_m: int
    block_n: int
    warps: int


DERIVATIVE = Tile(32, 128, 4)
