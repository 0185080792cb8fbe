"""The rows of the queries before the backward's pass, and those of packed sequences after it.

Before: the LSE to base 2, and delta = rowsum(dO out) - dlse (Dao 2023, arXiv:2307.08691). They lie
in tiles, each of rows of one head and one sequence, which the pass copies whole. After: dQ out of
its sums, which the pass adds to by tiles.

In a head's tiles, those of sequence b of a packed call begin with cu_seqlens_q[b] // BM + b, so
that no two sequences share one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.gluon.arguments import length
from fastattn.ops.attention.gluon.arithmetic import wide
from fastattn.ops.common import gluon as kernels

QUERIES = 64  # of a tile
SIZES = ["heads", "seqlen_q", "longest", "tiles", "eighth"]


class Tiles(NamedTuple):
    """How many tiles of rows a call has."""

    all: int
    head: int  # of a head: of each batch, or of all packed sequences
    longest: int  # of a head of the longest sequence
    programs: int  # as many for each sequence and head


def tiles(q: torch.Tensor, extras: Extras, settings: Settings) -> Tiles:
    """Those of a call."""
    heads = q.shape[-2]
    if extras.cu_seqlens_q is None:
        head = -(-q.shape[1] // QUERIES)
        all = q.shape[0] * heads * head
        return Tiles(all, head, head, all)
    batch = extras.cu_seqlens_q.shape[0] - 1
    head = q.shape[0] // QUERIES + max(batch, 1)  # of no tile there is no descriptor
    longest = -(-min(settings.max_seqlen_q, q.shape[0]) // QUERIES)
    return Tiles(heads * head, head, longest, longest * heads * batch)


class Rows(NamedTuple):
    """The tile of rows that a program has."""

    head: Any
    row: Any  # the first, of the sequence
    queries: Any  # how many the sequence has
    token: Any  # where the sequence begins, int64
    line: Any  # where it begins for this head in (batch, heads, seqlen_q), int64
    tile: Any  # the sequence's first, among those of the head or of all


@gluon.jit
def rows_of_program(cu_seqlens, used, heads, seqlen_q, longest, tiles, BM: gl.constexpr):
    plane = gl.program_id(0) // longest
    row = gl.program_id(0) % longest * BM
    batch = plane // heads
    head = plane % heads
    if cu_seqlens is None:
        token = batch.to(gl.int64) * seqlen_q
        return Rows(head, row, seqlen_q, token, plane.to(gl.int64) * seqlen_q, plane * tiles)
    else:
        start, queries = length(cu_seqlens, used, batch)
        line = head.to(gl.int64) * seqlen_q + start
        return Rows(head, row, queries, start.to(gl.int64), line, start // BM + batch)


@gluon.jit(do_not_specialize=SIZES)
def attention_rows(
    dout_ptr,  # (batch, seqlen_q, heads, head_dim_v), contiguous, like out; packed: (total_q, ...)
    out_ptr,
    lse_ptr,  # (batch, heads, seqlen_q), float32, contiguous, like dlse; packed: (heads, total_q)
    dlse_ptr,  # or None
    cu_seqlens_ptr,  # (batch + 1,) or None
    used_ptr,  # (batch,) or None
    base2_ptr,  # float32, tiles of all heads
    delta_ptr,
    heads,
    seqlen_q,  # packed: total
    longest,
    tiles,
    eighth,  # of head_dim_v
    D: gl.constexpr,
    BM: gl.constexpr,
):
    """delta and the LSE to base 2 of a tile of rows; an LSE of inf, so that P is 0, where no row is
    or it sees no key."""
    TILE: gl.constexpr = wide(D)
    x = rows_of_program(cu_seqlens_ptr, used_ptr, heads, seqlen_q, longest, tiles, BM)
    if x.row >= x.queries:  # a shorter sequence
        return
    rows = x.row + gl.arange(0, BM, gl.SliceLayout(1, TILE))
    columns = gl.arange(0, D, gl.SliceLayout(0, TILE))[None, :]
    inside = rows < x.queries
    at = ((x.token + rows) * heads + x.head)[:, None] * (eighth * 8) + columns
    within = inside[:, None] & (columns < eighth * 8)
    dout = gl.load(dout_ptr + at, mask=within, other=0.0).to(gl.float32)
    out = gl.load(out_ptr + at, mask=within, other=0.0).to(gl.float32)
    delta = gl.sum(dout * out, 1)
    lse = gl.load(lse_ptr + (x.line + rows), mask=inside, other=float("-inf"))
    if dlse_ptr is not None:
        delta -= gl.load(dlse_ptr + (x.line + rows), mask=inside, other=0.0)
    blind = lse == float("-inf")
    to = x.tile.to(gl.int64) * BM + rows
    if cu_seqlens_ptr is not None:
        to += x.head.to(gl.int64) * tiles * BM
    gl.store(base2_ptr + to, gl.where(blind, float("inf"), lse * 1.4426950408889634))
    gl.store(delta_ptr + to, gl.where(blind, 0.0, delta))


@gluon.jit(do_not_specialize=SIZES)
def attention_dq(
    dq_ptr,  # (total_q, heads, head_dim), contiguous
    sums_ptr,  # float32, (rows of the tiles of a head, heads, head_dim)
    cu_seqlens_ptr,
    used_ptr,  # or None
    heads,
    seqlen_q,
    longest,
    tiles,
    eighth,  # of head_dim
    scale,
    D: gl.constexpr,
    BM: gl.constexpr,
):
    """dQ of a tile of rows of packed sequences."""
    TILE: gl.constexpr = wide(D)
    x = rows_of_program(cu_seqlens_ptr, used_ptr, heads, seqlen_q, longest, tiles, BM)
    rows = x.row + gl.arange(0, BM, gl.SliceLayout(1, TILE))
    columns = gl.arange(0, D, gl.SliceLayout(0, TILE))[None, :]
    inside = (rows < x.queries)[:, None] & (columns < eighth * 8)
    of_sums = x.tile.to(gl.int64) * BM + rows
    sums = gl.load(
        sums_ptr + ((of_sums * heads + x.head)[:, None] * (eighth * 8) + columns),
        mask=inside, other=0.0,
    )  # fmt: skip
    at = ((x.token + rows) * heads + x.head)[:, None] * (eighth * 8) + columns
    gl.store(dq_ptr + at, (sums * scale).to(dq_ptr.dtype.element_ty), mask=inside)


# --- launching ------------------------------------------------------------------------------------


def before(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    of: Tiles,
    extras: Extras,
    box: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LSE to base 2, delta), float32 of (tiles * QUERIES,); inf and 0 where no row is."""
    heads, head_dim_v = dout.shape[-2:]
    packed = extras.cu_seqlens_q is not None
    shape = (of.all * QUERIES,)
    base2 = lse.new_full(shape, float("inf")) if packed else lse.new_empty(shape)
    delta = lse.new_zeros(shape) if packed else lse.new_empty(shape)
    kernels.launch(
        attention_rows, (of.programs,),
        dout.contiguous(), out.contiguous(), lse.contiguous(),
        None if dlse is None else dlse.contiguous(),
        *map(_contiguous, (extras.cu_seqlens_q, extras.seqused_q)), base2, delta,
        heads, lse.shape[-1], of.longest, of.head, head_dim_v // 8, D=box, BM=QUERIES,
    )  # fmt: skip
    return base2, delta


def after(
    sums: torch.Tensor, q: torch.Tensor, scale: float, of: Tiles, extras: Extras, box: int
) -> torch.Tensor:
    """dq, contiguous, of its sums without the scale; packed: (1, rows of a head's tiles, ...)."""
    if extras.cu_seqlens_q is None:
        return torch.mul(sums, scale, out=q.new_empty(q.shape))
    dq = q.new_zeros(q.shape)
    total, heads, head_dim = q.shape
    kernels.launch(
        attention_dq, (of.programs,),
        dq, sums, *map(_contiguous, (extras.cu_seqlens_q, extras.seqused_q)),
        heads, total, of.longest, of.head, head_dim // 8, float(scale), D=box, BM=QUERIES,
    )  # fmt: skip
    return dq


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
