"""Tiles of the kernels of `rotary`: how many heads of a token one program turns, on how many warps.

Nothing here is measured on a GPU yet. The kernels only move memory: about 2048 elements a program
are 16 a thread on 4 warps, loads of 16 bytes for 16-bit heads, and programs enough to fill a GPU at
a few hundred tokens. cos and sin of a token are read once for all heads of a program. The backward
of a norm holds a tile twice, beside the sums for the weight: half of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.ops.common.tiles import power_of_two

MAX_HEAD_DIM = 4096
ELEMENTS = 2048
# Of the backward of a norm, a multiprocessor: programs loop over the tokens, and add up.
PROGRAMS = 4


@dataclass(frozen=True)
class Tile:
    """`heads` heads, of each `pairs` pairs and `rest` elements that are not rotated (or none)."""

    heads: int
    pairs: int
    rest: int
    num_warps: int = 4


def forward(head_dim: int, rotary_dim: int, heads: int) -> Tile:
    """Of the rotation, forward or backward; `heads` is the larger number of q's and k's."""
    return _tile(head_dim, rotary_dim, heads, ELEMENTS)


def backward(head_dim: int, rotary_dim: int, heads: int) -> Tile:
    """Of the backward with a norm."""
    return _tile(head_dim, rotary_dim, heads, ELEMENTS // 2)


def _tile(head_dim: int, rotary_dim: int, heads: int, elements: int) -> Tile:
    pairs, left = power_of_two(rotary_dim // 2), head_dim - rotary_dim
    rest = power_of_two(left) if left else 0
    fitting = max(1, elements // power_of_two(2 * pairs + rest))
    return Tile(min(fitting, power_of_two(heads)), pairs, rest)
