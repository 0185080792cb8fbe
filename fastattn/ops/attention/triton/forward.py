"""Attention forward: one program per (query tile, head, batch).

    for each key tile:  s = softmax_scale log2(e) q k^T
                        m' = max(m, rowmax s);  p = 2^(s - m')
                        l = l 2^(m - m') + rowsum p;  acc = acc 2^(m - m') + p v
    out = acc / l,  lse = (m + log2 l) ln 2

(Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691.) Key tiles that every
row of the query tile sees whole come first and carry no mask arithmetic; then the tiles that the
causal diagonal or the key limit crosses. For 4 x 4 tiles, `.` without mask arithmetic, `/` with it:

    / - - -        tiles past the diagonal (-) are not visited
    . / - -
    . . / -
    . . . /
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import tiles
from fastattn.ops.attention.triton.scores import hide, load_tile, store_tile
from fastattn.ops.common import launch

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_D)
    total,  # (BLOCK_M,) l
    top,  # (BLOCK_M,) m
    q,  # (BLOCK_M, BLOCK_D)
    k_base,
    v_base,
    mask_base,  # at the tile's first query and key 0
    rows,  # (BLOCK_M,) queries inside the tile
    start,
    end,
    stride_k,
    stride_v,
    stride_mask_q,
    stride_mask_k,
    rows_left,
    key_limit,
    diagonal,  # the tile's first query sees the keys j <= diagonal
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Fold the key tiles [start, end) into the running softmax."""
    columns = tl.arange(0, BLOCK_N)
    for n in range(start, end, BLOCK_N):
        first = tl.cast(n, tl.int64)
        k = load_tile(
            k_base + first * stride_k, columns, stride_k, key_limit - n, HEAD_DIM, BLOCK_D, BOUNDARY
        )
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        scores = hide(
            scores, mask_base + first * stride_mask_k, rows[:, None], columns[None, :],
            stride_mask_q, stride_mask_k, rows_left, key_limit - n, diagonal - n, CAUSAL, HAS_MASK,
            BOUNDARY,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has the maximum -inf; -inf - -inf would be NaN.
        harmless = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - harmless[:, None])
        alpha = tl.exp2(top - harmless)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_tile(
            v_base + first * stride_v, columns, stride_v, key_limit - n, HEAD_DIM, BLOCK_D, BOUNDARY
        )
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["heads", "group_size", "seqlen_q", "seqlen_k"])
def _forward_kernel(
    q_ptr,  # (batch, seqlen_q, heads, head_dim)
    k_ptr,  # (batch, seqlen_k, kv_heads, head_dim)
    v_ptr,
    mask_ptr,  # (batch, heads, seqlen_q, seqlen_k) by strides, uint8
    key_lengths_ptr,  # (batch,)
    out_ptr,  # as q, contiguous
    lse_ptr,  # (batch, heads, seqlen_q), contiguous
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ob, stride_os, stride_oh,
    heads,
    group_size,
    seqlen_q,
    seqlen_k,
    scale_log2,  # softmax_scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr,
):  # fmt: skip
    # One grid axis, for batch * heads may pass 65535. Neighbours share a head, so its keys stay in
    # the L2; under a causal mask the longest rows of tiles start first.
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    program = tl.program_id(0)
    tile_m = program % tiles_m
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m
    batch_head = program // tiles_m
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)

    first_row = tile_m * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    rows_left = seqlen_q - first_row
    q_base = q_ptr + batch * stride_qb + head * stride_qh + first_row.to(tl.int64) * stride_qs
    k_base = k_ptr + batch * stride_kb + (head // group_size) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_size) * stride_vh
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += batch * stride_mb + head * stride_mh + first_row.to(tl.int64) * stride_mq
    q = load_tile(q_base, rows, stride_qs, rows_left, HEAD_DIM, BLOCK_D, True)

    key_limit = seqlen_k
    if HAS_KEY_LENGTHS:
        key_limit = tl.minimum(key_limit, tl.load(key_lengths_ptr + batch).to(tl.int32))
    diagonal = first_row + seqlen_k - seqlen_q
    end = key_limit
    whole = key_limit  # keys below it are seen by every row of the tile
    if CAUSAL:
        end = tl.minimum(end, diagonal + BLOCK_M)
        whole = tl.minimum(whole, diagonal + 1)
    whole = tl.maximum(whole, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, mask_base, rows, 0, whole, stride_ks, stride_vs,
        stride_mq, stride_mk, rows_left, key_limit, diagonal, scale_log2, HEAD_DIM, BLOCK_D,
        BLOCK_N, CAUSAL, HAS_MASK, False,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, mask_base, rows, whole, end, stride_ks, stride_vs,
        stride_mq, stride_mk, rows_left, key_limit, diagonal, scale_log2, HEAD_DIM, BLOCK_D,
        BLOCK_N, CAUSAL, HAS_MASK, True,
    )  # fmt: skip

    # A row without a key has top -inf and total 0, made 1: out 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    out = acc / total[:, None]
    lse = (top + tl.log2(total)) * LN_2
    out_base = out_ptr + batch * stride_ob + head * stride_oh + first_row.to(tl.int64) * stride_os
    store_tile(out_base, out, rows, stride_os, rows_left, HEAD_DIM, BLOCK_D)
    lse_base = lse_ptr + batch_head.to(tl.int64) * seqlen_q + first_row
    tl.store(lse_base + rows, lse, mask=rows < rows_left)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out as q, lse (batch, heads, seqlen_q) in float32."""
    batch, seqlen_q, heads, head_dim = q.shape
    q, k, v = readable(q), readable(k), readable(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    seen = mask_bytes(mask, q)
    architecture = launch.architecture(q.device)
    kernel = tiles.DECODE if seqlen_q <= tiles.DECODE_QUERIES else tiles.FORWARD
    tile = tiles.tile(kernel, architecture, q.element_size(), head_dim, mask is not None)
    launch.launch(
        _forward_kernel,
        (triton.cdiv(seqlen_q, tile.block_m) * heads * batch,),
        q,
        k,
        v,
        seen,
        q if key_lengths is None else key_lengths,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *mask_strides(mask, seen),
        *out.stride()[:3],
        heads,
        heads // k.shape[2],
        seqlen_q,
        k.shape[1],
        softmax_scale * LOG2_E,
        HEAD_DIM=head_dim,
        BLOCK_D=tiles.block_d(head_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        CAUSAL=causal,
        HAS_MASK=mask is not None,
        HAS_KEY_LENGTHS=key_lengths is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


# Offsets inside a tile are 32-bit, and a tile has at most 128 rows (tiles.py).
MAX_ROW_STRIDE = 2**31 // 128 - 1


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where the kernels can read it, else a copy.

    They read any strides but a strided last dimension and tokens 2^24 elements apart.
    """
    return x if x.stride(-1) == 1 and x.stride(1) <= MAX_ROW_STRIDE else x.contiguous()


def mask_bytes(mask: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """The mask as bytes, in place if it can be; any tensor stands in for none, for none is read."""
    if mask is None:
        return stand_in
    return (mask if max(mask.stride()[2:]) <= MAX_ROW_STRIDE else mask.contiguous()).view(
        torch.uint8
    )


def mask_strides(mask: torch.Tensor | None, seen: torch.Tensor) -> tuple[int, ...]:
    """Strides by which the mask's bytes read as (batch, heads, seqlen_q, seqlen_k)."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else stride for n, stride in zip(seen.shape, seen.stride()))
