"""Decoding on a key-value cache: append the new keys and values, then the forward kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.ops.attention import tiles
from fastattn.ops.attention import triton as attention
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.cache.stored import bits
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton import launching
from fastattn.ops.attention.triton.forward import attend
from fastattn.ops.attention.triton.rotary import rotated
from fastattn.ops.attention.triton.stored import narrowed
from fastattn.ops.common import launch
from fastattn.ops.common.matrices import dense


@triton.jit(do_not_specialize=[*launching.SIZES, "capacity", "stride_kcb", "stride_kcs",
                               "stride_kch", "stride_vcb", "stride_vcs", "stride_vch"])  # fmt: skip
def _append_kernel(
    k_cache_ptr,  # (cache_batch, capacity, kv_heads, head_dim); paged: (pages, page_size, ...)
    v_cache_ptr,
    k_ptr,  # (batch, seqlen_new, kv_heads, head_dim)
    v_ptr,
    lengths_ptr,  # (batch,) before the call
    block_table_ptr,
    cache_indices_ptr,
    rotary_cos_ptr,
    rotary_sin_ptr,
    k_scale_ptr,  # of a cache of 8-bit numbers: (kv_heads,), or (batch, kv_heads) if SCALES_VARY
    v_scale_ptr,
    stride_kcb, stride_kcs, stride_kch,  # in units of ALIGN elements, as those below
    stride_vcb, stride_vcs, stride_vch,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_table,
    kv_heads,
    seqlen_new,
    capacity,  # keys that a sequence can have
    page_size,
    pages,
    rotary_half,
    rotary_positions,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY_INTERLEAVED: tl.constexpr,
    SCALES_VARY: tl.constexpr,
):  # fmt: skip
    """One program writes the heads of one token. What has no room in the cache is not written."""
    token = (tl.program_id(0) % seqlen_new).to(tl.int64)
    batch = (tl.program_id(0) // seqlen_new).to(tl.int64)
    position = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int64), capacity) + token
    place = batch
    slot = position
    if block_table_ptr is not None:
        known = tl.minimum(tl.maximum(slot, 0), capacity - 1)
        entry = block_table_ptr + batch * stride_table + known // page_size
        place = tl.load(entry).to(tl.int64)
        slot = known % page_size
    elif cache_indices_ptr is not None:
        place = tl.load(cache_indices_ptr + batch).to(tl.int64)
    fits = (position >= 0) & (position < capacity) & (place >= 0) & (place < pages)
    written = tl.where(fits, kv_heads, 0)
    for first_head in range(0, kv_heads, BLOCK_H):
        head = first_head + tl.arange(0, BLOCK_H)
        inside = head < written
        row = inside[:, None]
        head = head.to(tl.int64)
        columns = tl.arange(0, BLOCK_D)[None, :]
        k_base = k_ptr + (batch * stride_kb + token * stride_ks) * ALIGN
        k_offsets = head * stride_kh * ALIGN
        k = tl.load(
            k_base + (k_offsets[:, None] + columns), mask=row & (columns < HEAD_DIM), other=0.0
        )
        if rotary_cos_ptr is not None:
            k = rotated(
                k, k_base, k_offsets, inside, position + tl.zeros_like(head),
                rotary_cos_ptr, rotary_sin_ptr, rotary_half, rotary_positions, ROTARY_INTERLEAVED,
                BLOCK_D,
            )  # fmt: skip
        scales = head
        if SCALES_VARY:
            scales += batch * kv_heads
        if k_scale_ptr is not None:
            k = narrowed(k, k_scale_ptr + scales, inside, k_cache_ptr.dtype.element_ty)
        target = k_cache_ptr + (place * stride_kcb + slot * stride_kcs) * ALIGN
        target += head[:, None] * stride_kch * ALIGN
        tl.store(target + columns, k, mask=row & (columns < HEAD_DIM))
        columns = tl.arange(0, BLOCK_DV)[None, :]
        v_base = v_ptr + (batch * stride_vb + token * stride_vs) * ALIGN
        v_base += head[:, None] * stride_vh * ALIGN
        v = tl.load(v_base + columns, mask=row & (columns < HEAD_DIM_V), other=0.0)
        if v_scale_ptr is not None:
            v = narrowed(v, v_scale_ptr + scales, inside, v_cache_ptr.dtype.element_ty)
        target = v_cache_ptr + (place * stride_vcb + slot * stride_vcs) * ALIGN
        target += head[:, None] * stride_vch * ALIGN
        tl.store(target + columns, v, mask=row & (columns < HEAD_DIM_V))


def _append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    capacity: int,
    cache: launching.Cache,
) -> None:
    """Write k and v behind the first `lengths` keys of the cache."""
    batch, seqlen_new, kv_heads, head_dim = k.shape
    k, v = launching.readable(k), launching.readable(v)
    table = cache.block_table
    width, width_v = tiles.block_d(head_dim), tiles.block_d(v.shape[3])
    align = launching.alignment(k_cache, v_cache, k, v)
    launch.launch(
        _append_kernel,
        (batch * seqlen_new,),
        k_cache,
        v_cache,
        k,
        v,
        lengths,
        table,
        cache.indices,
        cache.rotary_cos,
        cache.rotary_sin,
        cache.k_scale,
        cache.v_scale,
        *launching.units(k_cache, align),
        *launching.units(v_cache, align),
        *launching.units(k, align),
        *launching.units(v, align),
        0 if table is None else table.stride(0),
        kv_heads,
        seqlen_new,
        capacity,
        k_cache.shape[1],
        k_cache.shape[0],
        *launching.rotary_sizes(cache),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=v.shape[3],
        BLOCK_D=width,
        BLOCK_DV=width_v,
        BLOCK_H=max(1, min(triton.next_power_of_2(kv_heads), 4096 // max(width, width_v))),
        ALIGN=align,
        ROTARY_INTERLEAVED=cache.rotary_interleaved,
        SCALES_VARY=cache.k_scale is not None and cache.k_scale.dim() == 2,
        num_warps=4,
        num_stages=1,
    )


def unsupported(problem: CacheProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    return attention.unsupported(problem.attention)


def forward(
    q: torch.Tensor, extras: Extras, settings: Settings, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); the new keys and values, if there are any, are in the caches afterwards."""
    k_scale, v_scale = dense(call.k_scale), dense(call.v_scale)
    if k_scale is not None and v_scale is not None and k_scale.dim() != v_scale.dim():
        rows = len(call.lengths), call.k.shape[2]
        k_scale, v_scale = (x.expand(rows).contiguous() for x in (k_scale, v_scale))
    cache = launching.Cache(
        block_table=dense(call.block_table),
        indices=dense(call.indices),
        starts=dense(call.starts),
        rotary_cos=dense(call.rotary_cos),
        rotary_sin=dense(call.rotary_sin),
        k_scale=k_scale,
        v_scale=v_scale,
        used=True,
        capacity=call.capacity,
        seqlen_new=call.seqlen_new,
        rotary_interleaved=call.rotary_interleaved,
        rotary_advances=call.rotary_advances,
        num_splits=call.num_splits,
    )
    lengths = call.lengths.contiguous()
    if call.new_k is not None and call.new_v is not None and call.seqlen_new * call.capacity:
        _append(bits(call.k), bits(call.v), call.new_k, call.new_v, lengths, call.capacity, cache)
    extras = extras._replace(key_lengths=lengths)  # the kernels add cache.seqlen_new
    k_cache, v_cache = call.k, call.v
    if q.device.type == "cpu" or launch.architecture(q.device) < 89:
        k_cache, v_cache = bits(k_cache), bits(v_cache)
    return attend(q, k_cache, v_cache, extras, settings, cache)
