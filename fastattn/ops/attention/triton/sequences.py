"""Where sequences begin and end, and which keys a tile of queries has to visit."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention import tiles

SEQUENCES = tl.constexpr(128)  # that `find_part` looks at at once
PART_STEP = tl.constexpr(tiles.MAX_BLOCK_N)  # parts end where key tiles do


class Lengths(NamedTuple):
    """Tokens of the sequences of a call."""

    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any
    seqused_q_ptr: Any
    seqused_k_ptr: Any
    key_lengths_ptr: Any  # without `new`
    q: Any  # of a padded tensor, or a packed total
    k: Any
    new: Any  # keys that the call appended to a cache


@triton.jit
def sequence(cu_seqlens_ptr, seqused_ptr, batch, seqlen):
    """(first token, tokens) of a sequence; `seqlen` is that of a padded tensor, or a packed total.

    Contents that point outside of the tensor are cut to it: nothing is read there.
    """
    start = tl.cast(0, tl.int64)
    length = seqlen
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), seqlen)
        stop = tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64)
        length = (tl.minimum(tl.maximum(stop, start), seqlen) - start).to(tl.int32)
    if seqused_ptr is not None:
        length = held(seqused_ptr, batch, length, 0)
    return start, length


@triton.jit
def held(lengths_ptr, batch, most, seqlen_new):
    """Tokens of a sequence, of which `seqlen_new` are not in `lengths` yet: from 0 to `most`.

    Counted in 64 bits, so that wrong contents are cut to the tensor before they can wrap.
    """
    before = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int64), most)
    return tl.minimum(tl.maximum(before + seqlen_new, 0), most).to(tl.int32)


class Parts(NamedTuple):
    """The parts of the keys that are attended one by one, and where their results go."""

    most: Any  # parts that a sequence has
    length: Any  # keys of a part, at least
    out_ptr: Any  # (most, *out.shape), float32
    lse_ptr: Any  # (most, *lse.shape)
    out: Any  # strides from part to part, that of out in units of ALIGN
    lse: Any


@triton.jit
def part_length(keys, splits, split_length):
    """Keys of a part of a sequence: of `split_length` or more, so that there are at most `splits`.

    It follows from the sequence's own length, and so do the bits of its result.
    """
    even = tl.cdiv(tl.cdiv(keys, splits), PART_STEP) * PART_STEP
    return tl.maximum(even, split_length)


@triton.jit
def parts_of(keys, splits, split_length):
    """Parts of a sequence; one of a sequence without keys."""
    return tl.maximum(tl.cdiv(keys, part_length(keys, splits, split_length)), 1)


@triton.jit
def find_part(number, batch_size, lengths, parts):
    """(sequence, its part) of part `number` of the batch, and how many it has; in 64 bits."""
    if lengths.key_lengths_ptr is None:
        each = parts_of(lengths.k, parts.most, parts.length)
        found = tl.cast(number, tl.int64) // each
        part = (number - found * each).to(tl.int32)
        total = tl.cast(batch_size, tl.int64) * each
    else:
        found = tl.cast(0, tl.int64)
        before = tl.cast(0, tl.int64)  # parts of the sequences before this one
        total = tl.cast(0, tl.int64)
        for first in range(0, batch_size, SEQUENCES):
            b = first + tl.arange(0, SEQUENCES)
            place = tl.minimum(b, batch_size - 1)
            keys = held(lengths.key_lengths_ptr, place, lengths.k, lengths.new)
            counts = parts_of(keys, parts.most, parts.length)
            counts = tl.where(b < batch_size, counts, 0).to(tl.int64)
            passed = (b < batch_size) & (total + tl.cumsum(counts, 0) <= number)
            found += tl.sum(passed.to(tl.int64), 0)
            before += tl.sum(tl.where(passed, counts, 0), 0)
            total += tl.sum(counts, 0)
        part = (number - before).to(tl.int32)
    return found, part, total


@triton.jit
def gap(cu_seqlens_ptr, batch, batch_size, start, covered, tokens):
    """(first, end) of the packed tokens after a sequence's own that no sequence has.

    They reach from `covered` tokens of it, which its tiles or seqused leave, to the next sequence,
    or to the end of the tensor.
    """
    first = start + covered
    stop = tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64)
    stop = tl.where(batch + 1 == batch_size, tokens, tl.minimum(stop, tokens))
    return first, tl.maximum(first, stop)


@triton.jit
def bound(edge, shift, TOP_LEFT: tl.constexpr):
    """An edge of the band, from the top left or the bottom right corner, as a difference j - i."""
    if not TOP_LEFT:
        edge += shift
    return edge


@triton.jit
def key_range(
    first_row,  # the first query of a tile
    last_row,  # the last one
    begin,  # no key before it
    end,  # and none from it on
    low,
    high,
    BLOCK_N: tl.constexpr,
    LEFT_EDGE: tl.constexpr,  # positions hide keys on the left: a band's, or those before `begin`
):
    """(start, whole_start, whole_end, end): key tiles that a query tile has to visit.

    Every query of the tile sees all keys of the tiles from whole_start to whole_end; the band's
    edges and the key limit cross the tiles around them only. Without LEFT_EDGE, `begin` is where
    documents or a split begin, and whole_start is start.
    """
    whole_start = begin
    whole_end = end
    if high is not None:
        end = tl.minimum(end, last_row + high + 1)
        whole_end = tl.minimum(whole_end, first_row + high + 1)
    if low is not None:
        begin = tl.maximum(begin, first_row + low)
        whole_start = tl.maximum(whole_start, last_row + low)
    begin = tl.maximum(begin, 0)
    start = begin // BLOCK_N * BLOCK_N
    end = tl.where(begin < end, end, start)
    if LEFT_EDGE:
        whole_start = tl.cdiv(tl.maximum(whole_start, 0), BLOCK_N)
        whole_start = tl.minimum(whole_start, tl.cdiv(end, BLOCK_N))
        whole_start = tl.maximum(whole_start * BLOCK_N, start)
    else:
        whole_start = start
    whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK_N * BLOCK_N, whole_start)
    return start, whole_start, whole_end, end


@triton.jit
def query_range(
    first_key,  # the first key of a tile
    key_limit,  # keys from here on are padding
    start,  # no query before it
    end,  # and none from it on
    low,
    high,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(start, whole_start, whole_end, end): query tiles that a key tile has to visit.

    Every query of the tiles from whole_start to whole_end sees all keys of the tile, padding apart.
    """
    if key_limit <= first_key:
        end = 0
    whole_start = 0
    whole_end = end
    if high is not None:
        start = tl.maximum(start, first_key - high)
        whole_start = first_key + BLOCK_N - 1 - high
    if low is not None:
        end = tl.minimum(end, tl.minimum(first_key + BLOCK_N, key_limit) - low)
        whole_end = tl.minimum(whole_end, first_key - low + 1)
    first = tl.maximum(start, 0)
    start = first // BLOCK_M * BLOCK_M
    end = tl.where(first < end, end, start)
    whole_end = tl.minimum(whole_end, end)
    whole_start = tl.minimum(tl.cdiv(tl.maximum(whole_start, 0), BLOCK_M), tl.cdiv(end, BLOCK_M))
    whole_start = tl.maximum(whole_start * BLOCK_M, start)
    if low is not None:
        whole_end = tl.maximum(whole_end, 0) // BLOCK_M * BLOCK_M
    return start, whole_start, tl.maximum(whole_end, whole_start), end
