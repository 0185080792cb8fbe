"""The definition of attention on a key-value cache: append, gather every sequence's keys, attend.

Plain PyTorch without a shape that depends on data, so that torch.compile and CUDA graphs take it.
"""

from __future__ import annotations

import torch

from fastattn.ops.attention import reference
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.cache.stored import bits, dequantised, quantised
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.problem import values_are_checked
from fastattn.ops.common import modes
from fastattn.ops.common.rotation import rotated


def forward(
    problem: CacheProblem, q: torch.Tensor, extras: Extras, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor]:
    q = rotated_queries(q, call)
    lengths = append(call).clamp(max=call.capacity)
    k, v = held(call, modes.at_least_float32(q.dtype))
    return reference.on_lengths(problem.attention, q, k, v, extras, lengths, call.starts)


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """x (batch, seqlen, heads, head_dim) turned by positions (batch, seqlen)."""
    precision = modes.at_least_float32(x.dtype)
    positions = positions.clamp(0, cos.shape[0] - 1)
    cos = cos.to(precision)[positions][:, :, None]
    sin = sin.to(precision)[positions][:, :, None]
    return rotated(x.to(precision), cos, sin, 2 * cos.shape[-1], interleaved).to(x.dtype)


def rotated_queries(q: torch.Tensor, call: CacheCall) -> torch.Tensor:
    if call.rotary_cos is None or call.rotary_sin is None:
        return q
    ahead = torch.arange(q.shape[1], device=q.device) * int(call.rotary_advances)
    positions = call.lengths.long()[:, None] + ahead
    return rotate(q, call.rotary_cos, call.rotary_sin, positions, call.rotary_interleaved)


def rotated_keys(call: CacheCall, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if call.rotary_cos is None or call.rotary_sin is None:
        return k
    return rotate(k, call.rotary_cos, call.rotary_sin, positions, call.rotary_interleaved)


def as_stored(
    call: CacheCall, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys, turned, and values as the caches hold them."""
    if call.k_scale is None or call.v_scale is None:
        return k, v
    return quantised(k, call.k_scale, call.k.dtype), quantised(v, call.v_scale, call.v.dtype)


def append(call: CacheCall) -> torch.Tensor:
    """Write the new keys and values into the cache; the lengths afterwards."""
    lengths = call.lengths.long().clamp(max=call.capacity)
    if call.new_k is None or call.new_v is None or not call.new_k.numel() * call.capacity:
        return lengths + call.seqlen_new
    positions = lengths[:, None] + torch.arange(call.seqlen_new, device=lengths.device)
    k, v = as_stored(call, rotated_keys(call, call.new_k, positions), call.new_v)
    if call.k_scale is not None:  # not all that follows takes float8
        k, v = bits(k), bits(v)
        call = call._replace(k=bits(call.k), v=bits(call.v))
    rows, slots = _places(call, positions)
    if not values_are_checked(call.lengths):
        fits = (positions >= 0) & (positions < call.capacity) & (rows >= 0) & (rows < len(call.k))
        rows, slots, k, v = _fitting(call, fits, rows, slots, k, v)
    call.k[rows, slots] = k
    call.v[rows, slots] = v
    return lengths + call.seqlen_new


def _fitting(
    call: CacheCall,
    fits: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The same writes, those of tokens that do not fit replaced by harmless ones.

    Their number is known to the device only, so each repeats the write of the first token that
    fits, or, if none does, writes what is in slot 0 of row 0.
    """
    none = ~fits.any()
    first = fits.flatten().int().argmax(0, keepdim=True)

    def instead(given: torch.Tensor, otherwise: torch.Tensor | int) -> torch.Tensor:
        """`given` where it fits, else its first that does, else `otherwise`."""
        repeated = torch.where(none, otherwise, given.flatten(0, 1).index_select(0, first))
        return torch.where(fits.view(*fits.shape, *[1] * (given.dim() - 2)), given, repeated)

    k, v = instead(k, call.k[0, 0]), instead(v, call.v[0, 0])
    return instead(rows, 0), instead(slots, 0), k, v


def _places(call: CacheCall, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where positions (batch, n) of the sequences lie: rows and slots of the cache, (batch, n)."""
    if call.block_table is not None:
        size = call.k.shape[1]
        page = (positions // max(size, 1)).clamp(0, max(call.block_table.shape[1] - 1, 0))
        return call.block_table.long().gather(1, page), positions % max(size, 1)
    rows = call.indices
    if rows is None:
        rows = torch.arange(positions.shape[0], device=positions.device)
    return rows.long()[:, None].expand_as(positions), positions


def held(call: CacheCall, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all sequences, those of 8-bit caches in `precision`."""
    k, v = _gathered(call)
    if call.k_scale is None or call.v_scale is None:
        return k, v
    return dequantised(k, call.k_scale, precision), dequantised(v, call.v_scale, precision)


def _gathered(call: CacheCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all sequences, (batch, capacity, kv_heads, ...)."""
    positions = torch.arange(call.capacity, device=call.k.device)
    positions = positions.expand(len(call.lengths), -1)
    rows, slots = _places(call, positions)
    rows, slots = rows.clamp(0, len(call.k) - 1), slots.clamp(0, call.k.shape[1] - 1)
    return call.k[rows, slots], call.v[rows, slots]
