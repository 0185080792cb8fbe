"""The `torch` backend of attention on a key-value cache: ATen's fused attention, on a CPU.

Adjacent sequences of equal length are batched, and read only their own keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fastattn.ops.attention import aten
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.cache.reference import (
    append,
    as_stored,
    rotated_keys,
    rotated_queries,
)
from fastattn.ops.attention.cache.stored import dequantised
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.sdpa import SMALLEST, sdpa
from fastattn.ops.common import modes
from fastattn.ops.common.dense import INDEX_DTYPES
from fastattn.ops.common.plain import ERRORS, plain


def unsupported(problem: CacheProblem) -> str | None:
    if problem.device.type != "cpu":
        return "ATen has no key-value cache; reading its lengths would stall the device"
    if modes.recorded():
        return "the sequences go through ATen by their lengths, which cannot be compiled"
    return aten.unsupported(problem.attention)


def straight(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    softmax_scale: float | None,
) -> torch.Tensor | None:
    """A plain causal call on a CPU (ops/attention/straight.py): one query and one new key a
    sequence, or the first keys of all. None for any other call; nothing is written then.
    """
    try:
        if k is None or v is None or modes.needs_grad(q, k_cache, v_cache, k, v):
            return None
        if not plain(q, k_cache, v_cache, k, v) or not modes.plain():
            return None
        if type(cache_lengths) is not torch.Tensor or cache_lengths.dtype not in INDEX_DTYPES:
            return None
        if softmax_scale is not None and not (
            type(softmax_scale) is float and SMALLEST <= softmax_scale < math.inf
        ):
            return None
        batch, seqlen_q, heads, head_dim = q.shape
        rows, capacity, kv_heads, _ = shape = k_cache.shape
        new = (batch, seqlen_q, kv_heads, head_dim)
        fits = rows == batch and k.shape == new and v.shape == new and seqlen_q > 0
        if not fits or heads % kv_heads or v_cache.shape != shape or shape[3] != head_dim:
            return None
        if not k_cache.stride(3) == v_cache.stride(3) == 1 or head_dim == 0:
            return None
        lengths = cache_lengths.tolist()
        if len(lengths) != batch or not (0 <= min(lengths) <= max(lengths) <= capacity - seqlen_q):
            return None
        if seqlen_q > 1 and (heads != kv_heads or any(lengths)):
            return None
    except ERRORS:
        return None
    group_size = heads // kv_heads
    q = q.transpose(1, 2) if group_size == 1 else q.reshape(batch, kv_heads, group_size, head_dim)
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    n = lengths[0]
    if lengths.count(n) == batch:
        end = n + seqlen_q
        k_cache[:, n:end] = k
        v_cache[:, n:end] = v
        keys, values = keys[:, :, :end], values[:, :, :end]
        out = sdpa(q, keys, values, None, 0.0, seqlen_q > 1, softmax_scale, False)
    else:
        sequences = torch.arange(batch, device=q.device)
        k_cache[sequences, cache_lengths] = k[:, 0]
        v_cache[sequences, cache_lengths] = v[:, 0]
        sizes = [last - first for first, last in _runs(lengths, False)]
        outs, first = [], 0
        for some, its_keys, its_values in zip(*(x.split(sizes) for x in (q, keys, values))):
            end = lengths[first] + 1
            its_keys, its_values = its_keys.narrow(2, 0, end), its_values.narrow(2, 0, end)
            outs.append(sdpa(some, its_keys, its_values, None, 0.0, False, softmax_scale, False))
            first += len(some)
        out = torch.cat(outs)
    return out.transpose(1, 2) if group_size == 1 else out.reshape(batch, 1, heads, head_dim)


def forward(
    problem: CacheProblem, q: torch.Tensor, extras: Extras, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q = rotated_queries(q, call)
    stops = _append(call)
    starts = [0] * len(stops) if call.starts is None else call.starts.tolist()
    slopes = extras.alibi_slopes
    alone = call.block_table is not None or call.indices is not None
    alone = alone or (slopes is not None and slopes.shape[0] > 1)
    spans = [(max(start, 0), stop) for start, stop in zip(starts, stops)]
    parts, precision = [], modes.at_least_float32(q.dtype)
    for first, end in _runs(spans, alone):
        k, v = _keys_of(call, slice(first, end), *spans[first])
        if call.k_scale is not None and call.v_scale is not None:
            k, v = (
                dequantised(x, scale if scale.dim() == 1 else scale[first:end], precision).to(
                    q.dtype
                )
                for x, scale in ((k, call.k_scale), (v, call.v_scale))
            )
        some = q if end - first == len(spans) else q[first:end]
        parts.append(aten.on_cache(problem.attention, some, k, v, extras, first))
    return aten.joined(parts, out_dim=0, lse_dim=0)


def _append(call: CacheCall) -> list[int]:
    """Write the new keys and values into the cache; the lengths afterwards.

    Plain copies where all sequences end at the same slot.
    """
    lengths, new = call.lengths.tolist(), call.seqlen_new
    if call.new_k is None or call.new_v is None:
        return [min(n, call.capacity) for n in lengths]
    end = lengths[0]
    in_order = call.block_table is None and call.indices is None
    if not in_order or lengths.count(end) < len(lengths) or not 0 <= end <= call.capacity - new:
        return append(call).tolist()
    k = call.new_k
    if call.rotary_cos is not None:
        k = rotated_keys(call, k, torch.arange(end, end + new, device=k.device)[None])
    call.k[:, end : end + new], call.v[:, end : end + new] = as_stored(call, k, call.new_v)
    return [end + new] * len(lengths)


def _keys_of(
    call: CacheCall, sequences: slice, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values from `start` to `stop` of a run of sequences; views, unless in pages.

    Of one sequence only, where a table or indices say where it lies.
    """
    k, v, b = call.k, call.v, sequences.start
    if call.block_table is not None:
        pages = call.block_table[b, : -(-stop // k.shape[1])]
        # index_select is twice as fast as k[pages]. To gather all sequences at once would be slower
        # again: they would have left the processor's cache when they are read (Xeon, 2026-11-26).
        k, v = (x.index_select(0, pages).flatten(0, 1)[None] for x in (k, v))
    elif call.indices is not None:
        row = int(call.indices[b])
        k, v = k[row : row + 1], v[row : row + 1]
    else:
        return k[sequences, start:stop], v[sequences, start:stop]
    return k[:, start:stop], v[:, start:stop]


def _runs(spans: Sequence[object], alone: bool) -> Iterator[tuple[int, int]]:
    """(first, end) of adjacent sequences that are equal; `alone`: of each by itself."""
    first = 0
    for end in range(1, len(spans) + 1):
        if alone or end == len(spans) or spans[end] != spans[first]:
            yield first, end
            first = end
