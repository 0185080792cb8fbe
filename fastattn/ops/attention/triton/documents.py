"""Which tiles of the scores documents leave: for each tile of one side, a range of the other side.

A tile of queries needs the keys whose document numbers lie between the smallest and the largest of
its own. Packed documents lie one after another, so these keys do as well, and all other tiles are
skipped; numbers in any order are right too, with less to skip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.sequences import held, sequence
from fastattn.ops.common import launch

CHUNK = 1024


@triton.jit(do_not_specialize=["own_stride", "other_stride", "own_seqlen", "other_seqlen", "tiles"])
def _ranges_kernel(
    ranges_ptr,  # (batch, tiles, 2), int32
    own_ptr,
    other_ptr,
    own_cu_ptr,
    other_cu_ptr,
    own_used_ptr,
    other_used_ptr,
    other_lengths_ptr,  # (batch,), or None
    own_stride,  # from batch to batch
    other_stride,
    own_seqlen,
    other_seqlen,
    tiles,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    start, length = sequence(own_cu_ptr, own_used_ptr, batch, own_seqlen)
    other_start, other_length = sequence(other_cu_ptr, other_used_ptr, batch, other_seqlen)
    if other_lengths_ptr is not None:
        other_length = held(other_lengths_ptr, batch, other_length, 0)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    pointers = own_ptr + batch * own_stride + start + place
    largest: tl.constexpr = 2**63 - 1
    own = tl.load(pointers, mask=place < length, other=0).to(tl.int64)
    low = tl.min(tl.where(place < length, own, largest), 0)
    high = tl.max(tl.where(place < length, own, -largest), 0)
    others = other_ptr + batch * other_stride + other_start
    first = tl.full((CHUNK,), 2147483647, tl.int32)
    last = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(0, other_length, CHUNK):
        j = chunk + tl.arange(0, CHUNK)
        other = tl.load(others + j, mask=j < other_length, other=0).to(tl.int64)
        wanted = (other >= low) & (other <= high) & (j < other_length)
        first = tl.where(wanted, tl.minimum(first, j), first)
        last = tl.where(wanted, j + 1, last)
    pair = ranges_ptr + tl.program_id(0).to(tl.int64) * 2
    end = tl.max(last, 0)
    tl.store(pair, tl.minimum(tl.min(first, 0), end))
    tl.store(pair + 1, end)


class TileRanges:
    """The launch, for the tiles of one side, of a plan."""

    def __init__(self, x: launching.Layout, block: int, tiles: int, *, of_queries: bool) -> None:
        own, other = (x.seqlen_q, x.seqlen_k) if of_queries else (x.seqlen_k, x.seqlen_q)
        strides = (0, 0) if x.packed else (own, other)
        self._shape, self._of_queries = (x.batch, tiles, 2), of_queries
        self._launch = launch.Prepared(
            _ranges_kernel,
            (x.batch * tiles,),
            (*strides, own, other, tiles),
            BLOCK=block,
            CHUNK=CHUNK,
            num_warps=4,
            num_stages=1,
        )

    def __call__(self, extras: Extras) -> torch.Tensor:
        """(batch, tiles, 2): the first position of the other side and the one after the last."""
        q = extras.q_documents, extras.cu_seqlens_q, extras.seqused_q
        k = extras.k_documents, extras.cu_seqlens_k, extras.seqused_k
        (own, *of_own), (other, *of_other) = (q, k) if self._of_queries else (k, q)
        assert own is not None
        ranges = own.new_empty(self._shape, dtype=torch.int32)
        lengths = extras.key_lengths if self._of_queries else None
        pairs = (x for pair in zip(of_own, of_other) for x in pair)
        self._launch(ranges, own, other, *pairs, lengths)
        return ranges
