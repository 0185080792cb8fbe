"""The `torch` backend of attention on a key-value cache: ATen's fused attention, on a CPU.

Adjacent sequences of equal length are batched, and read only their own keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.ops.attention import aten
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.cache.reference import append, rotated_keys, rotated_queries
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.problem import AttentionProblem


def unsupported(problem: CacheProblem) -> str | None:
    if problem.device.type != "cpu":
        return "ATen has no key-value cache; reading its lengths would stall the device"
    if torch.compiler.is_compiling():
        return "the sequences go through ATen by their lengths, which cannot be compiled"
    return aten.unsupported(problem.attention)


def attention_with_kv_cache(
    problem: AttentionProblem, q: torch.Tensor, extras: Extras, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q = rotated_queries(q, call)
    stops = _append(call)
    starts = [0] * len(stops) if call.starts is None else call.starts.tolist()
    slopes = extras.alibi_slopes
    alone = call.block_table is not None or call.indices is not None
    alone = alone or (slopes is not None and slopes.shape[0] > 1)
    spans = [(max(start, 0), stop) for start, stop in zip(starts, stops)]
    parts = []
    for first, end in _runs(spans, alone):
        k, v = _keys_of(call, slice(first, end), *spans[first])
        some = q if end - first == len(spans) else q[first:end]
        parts.append(aten.on_cache(problem, some, k, v, extras, first))
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
    call.k[:, end : end + new] = k
    call.v[:, end : end + new] = call.new_v
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


def _runs(spans: list[tuple[int, int]], alone: bool) -> Iterator[tuple[int, int]]:
    """(first, end) of adjacent sequences that are equal; `alone`: of each by itself."""
    first = 0
    for end in range(1, len(spans) + 1):
        if alone or end == len(spans) or spans[end] != spans[first]:
            yield first, end
            first = end
