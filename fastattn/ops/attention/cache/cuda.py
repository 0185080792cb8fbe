"""The `cuda` backend of attention on a key-value cache: csrc/attention/decode.cuh and its kin."""

from __future__ import annotations

import torch

from fastattn.ops.attention import cuda, tiles
from fastattn.ops.attention.cache.call import EXTRAS, CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.cache.reference import rotated_queries
from fastattn.ops.attention.cache.stored import bits
from fastattn.ops.attention.call import UNBOUNDED, Extras, Settings
from fastattn.ops.common import launch
from fastattn.ops.common.matrices import dense

MAX_KEYS = 2**30  # of a sequence: positions are 32-bit

# Rows of a tile: queries times the query heads that share a key head. A few tiles of them are still
# a decode: the keys, read once from memory, come from the L2 for the others.
TILE_ROWS = 16
SPLIT_TILES = 4


def unsupported(problem: CacheProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    return cuda.beyond_limits(problem.attention)


def split(
    capacity: int, batch: int, kv_heads: int, rows: int, multiprocessors: int, wanted: int | None
) -> tiles.Split:
    """The cut of a call with `rows` rows to a key head.

    A part's float32 result is small beside what it reads, so more tiles of rows have longer parts;
    of many, as in a prefill, there are blocks enough without any.

    Args:
        wanted: num_splits of the call.
    """
    row_tiles = -(-rows // TILE_ROWS)
    if row_tiles > SPLIT_TILES:
        wanted = 1
    least = tiles.SPLIT_KEYS * row_tiles if wanted is None else None
    return tiles.split(capacity, batch, kv_heads * row_tiles, multiprocessors, wanted, least)


def forward(
    q: torch.Tensor, extras: Extras, settings: Settings, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); the new keys and values, if there are any, are in the caches afterwards."""
    batch, seqlen_q, heads, _ = q.shape
    kv_heads, head_dim_v = call.k.shape[2], call.v.shape[3]
    capacity = min(call.capacity, MAX_KEYS)
    lengths, table, rows = call.lengths.contiguous(), dense(call.block_table), dense(call.indices)
    cos, sin = _tables(call.rotary_cos, call.rotary_sin, q.dtype)
    k_cache, v_cache = bits(call.k), bits(call.v)
    k_scale, v_scale = dense(call.k_scale), dense(call.v_scale)
    if call.new_k is not None and call.new_v is not None and call.new_k.numel() * capacity:
        torch.ops.fastattn_cuda.append_to_cache(
            k_cache, v_cache, cuda.readable(call.new_k), cuda.readable(call.new_v), lengths, table,
            rows, cos, sin, k_scale, v_scale, call.rotary_interleaved, capacity,
        )  # fmt: skip
    tile_rows = seqlen_q * (heads // kv_heads)
    padded = table is rows is call.starts is k_scale is None
    if tile_rows > SPLIT_TILES * TILE_ROWS and padded and capacity:
        return _prefill(q, extras, settings, call)
    out = q.new_empty((batch, seqlen_q, heads, head_dim_v))
    lse = q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    cut = split(
        capacity, batch, kv_heads, tile_rows, launch.multiprocessors(q.device), call.num_splits
    )
    part_out = part_lse = None
    if cut.most > 1:
        width = -(-head_dim_v // 4) * 4  # the kernels write and read 16 bytes at once
        part_lse = lse.new_empty((cut.most, batch, seqlen_q, heads))
        part_out = lse.new_empty((*part_lse.shape, width))
    # A side of the window that no key lies beyond hides nothing, and must not pass 2^31.
    left, right = (
        n if n == UNBOUNDED else min(n, capacity + seqlen_q)
        for n in (settings.window_left, settings.window_right)
    )
    torch.ops.fastattn_cuda.attend_to_cache(
        out, lse, part_out, part_lse, cuda.readable(q), k_cache, v_cache, lengths, table, rows,
        dense(call.starts), *(_float32(getattr(extras, name)) for name in EXTRAS), cos, sin,
        k_scale, v_scale, call.rotary_interleaved, call.rotary_advances, capacity, call.seqlen_new,
        cut.keys, cut.programs, left, right, settings.softmax_scale, settings.softcap,
    )  # fmt: skip
    return out, lse


def _prefill(
    q: torch.Tensor, extras: Extras, settings: Settings, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Many queries on a padded cache: the forward kernel, whose tiles of queries are larger."""
    q = rotated_queries(q, call)
    held = call.lengths.clamp(max=call.capacity) + call.seqlen_new  # cut to the cache by the kernel
    return cuda.forward(q, call.k, call.v, extras._replace(seqused_k=held), settings)


def _float32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def _tables(
    cos: torch.Tensor | None, sin: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The rotary tables, in float32 or both in `dtype`."""
    if cos is None or sin is None:
        return None, None
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, dtype):
        cos, sin = cos.float(), sin.float()
    return cos.contiguous(), sin.contiguous()
