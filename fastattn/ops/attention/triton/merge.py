"""Join the results of splits of the keys, each with its LSE, to the whole's."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention import tiles
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.scores import LN_2, LOG2_E
from fastattn.ops.attention.triton.sequences import held, parts_of
from fastattn.ops.common import launch

BLOCK_S = 8  # splits in flight
WARPS = 4


@triton.jit(do_not_specialize=launching.SIZES)
def _merge_kernel(
    part_out_ptr,  # (splits, batch, seqlen_q, heads, head_dim), float32, contiguous
    part_lse_ptr,  # (splits, batch, heads, seqlen_q), contiguous
    out_ptr,  # (batch, seqlen_q, heads, head_dim), contiguous
    lse_ptr,
    key_lengths_ptr,  # (batch,) without seqlen_new, or None
    stride_part_out: tl.int64,
    stride_part_lse: tl.int64,
    heads,
    seqlen_q,
    seqlen_k,
    seqlen_new,
    splits,  # parts that a sequence has at most
    split_length,  # keys of a part, at least
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program for each row: out = sum_s w_s out_s with w_s = exp(lse_s - lse).

    Rows of a sequence in one part are there already.
    """
    row = tl.program_id(0).to(tl.int64)  # of (batch, seqlen_q, heads)
    head = row % heads
    query = row // heads % seqlen_q
    batch = row // heads // seqlen_q
    line = (batch * heads + head) * seqlen_q + query
    length = seqlen_k
    if key_lengths_ptr is not None:
        length = held(key_lengths_ptr, batch, seqlen_k, seqlen_new)
    parts = parts_of(length, splits, split_length)
    if parts == 1:
        return
    columns = tl.arange(0, BLOCK_D)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, parts, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = split < parts
        split = split.to(tl.int64)
        lse = tl.load(
            part_lse_ptr + split * stride_part_lse + line, mask=there, other=float("-inf")
        )
        lse *= LOG2_E
        new_top = tl.maximum(top, tl.max(lse, 0))
        harmless = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - harmless)
        old = tl.exp2(top - harmless)
        pointers = (
            part_out_ptr + (split * stride_part_out + row * HEAD_DIM)[:, None] + columns[None, :]
        )
        # A split in which the row sees no key has no weight, and may hold 0 * NaN.
        exists = (lse != float("-inf"))[:, None] & (columns < HEAD_DIM)[None, :]
        part = tl.load(pointers, mask=exists, other=0.0)
        acc = acc * old + tl.sum(part * weight[:, None], 0)
        total = total * old + tl.sum(weight, 0)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)
    out = acc / total
    tl.store(
        out_ptr + row * HEAD_DIM + columns,
        out.to(out_ptr.dtype.element_ty),
        mask=columns < HEAD_DIM,
    )
    tl.store(lse_ptr + line, (top + tl.log2(total)) * LN_2)


def prepared(
    shape: tuple[int, ...], seqlen_k: int, seqlen_new: int, split: tiles.Split
) -> launch.Prepared:
    """The launch for an out of `shape`, to be called with the kernel's pointers.

    It writes out and lse of the sequences that have several parts.
    """
    batch, seqlen_q, heads, head_dim = shape
    rows = batch * seqlen_q * heads
    numbers = (
        rows * head_dim, rows, heads, seqlen_q, seqlen_k, seqlen_new, split.most, split.keys
    )  # fmt: skip
    return launch.Prepared(
        _merge_kernel,
        (rows,),
        numbers,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_S=BLOCK_S,
        num_warps=WARPS,
        num_stages=1,
    )
