"""How kernels walk through a block mask: along lists of the tiles that are kept.

A list belongs to a line of tiles: those of some queries, or transposed, those of some keys. The
line's side is the own side, the one that is walked the other side. A tile of the mask is walked in
steps of a kernel's tile, which divides it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Blocks(NamedTuple):
    """A block mask: for each line of its tiles, a list of those that are kept."""

    offsets_ptr: Any  # (batch, heads, lines + 1), where lists begin
    indices_ptr: Any  # numbers of kept tiles
    partial_ptr: Any  # and which patterns they have
    patterns_ptr: Any  # (patterns, queries, keys of a tile); None if all tiles are seen whole
    batch: Any  # strides of offsets
    head: Any
    OWN: tl.constexpr  # positions of a tile on the own side
    OTHER: tl.constexpr


@triton.jit
def kept_range(x, batch, head, first, BLOCK: tl.constexpr):
    """(start, end) of the steps of BLOCK along the line in which the position `first` is."""
    place = x.offsets_ptr + batch * x.batch + head * x.head + first // x.OWN
    subtiles: tl.constexpr = x.OTHER // BLOCK
    return tl.load(place) * subtiles, tl.load(place + 1) * subtiles


@triton.jit
def kept_tile(x, t, BLOCK: tl.constexpr):
    """(first position of step t, how far inside its tile of the mask it is, list entry)."""
    subtiles: tl.constexpr = x.OTHER // BLOCK
    entry = t // subtiles
    inner = t % subtiles * BLOCK
    return tl.load(x.indices_ptr + entry) * x.OTHER + inner, inner, entry


@triton.jit
def pattern_of(x, entry):
    """Pointer to a list entry's pattern; that of tiles that are seen whole is all true."""
    return x.patterns_ptr + tl.load(x.partial_ptr + entry).to(tl.int64) * (x.OWN * x.OTHER)
