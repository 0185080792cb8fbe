"""Attention on a key-value cache: the public function.

Inference only: the cache is written in place, and no gradient is kept.
"""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch

from fastattn import backends, proving
from fastattn.ops.attention.cache import aten, registration, stored
from fastattn.ops.attention.cache import proof as _proof
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem, check_contents, describe
from fastattn.ops.attention.call import NONE, Causal
from fastattn.ops.attention.problem import gather, values_are_checked
from fastattn.ops.common import modes
from fastattn.ops.common.dense import DTYPES
from fastattn.ops.common.dispatch import Dispatch

Outputs = tuple[torch.Tensor, torch.Tensor]
NO_FEATURE = (None,) * 9

BACKENDS = registration.BACKENDS

_dispatch: Dispatch[CacheProblem] = Dispatch(BACKENDS, registration.run_kernel)


@overload
def attention_with_kv_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Any,
) -> torch.Tensor: ...


@overload
def attention_with_kv_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> Outputs: ...


@overload
def attention_with_kv_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    return_lse: bool,
    **options: Any,
) -> torch.Tensor | Outputs: ...


def attention_with_kv_cache(  # type: ignore[misc]  # the overloads leave the options open
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    cache_starts: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: Causal = True,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | Outputs:
    """Attention of new queries on a key-value cache, which new keys and values are appended to.

    The keys of sequence b are the first n of its row of the cache, n being cache_lengths[b], plus
    seqlen_new if k and v are given; query i sees them up to key i + n - seqlen_q. For a few queries
    the kernels split the keys among programs (flash-decoding) and make the query heads that share a
    key head rows of one tile. All that varies from step to step is read on the device, so that a
    captured CUDA graph serves every length.

    A cache may hold 8-bit numbers (Micikevicius et al. 2022, arXiv:2209.05433): a key is then its
    stored number times k_scale of its head, a value likewise. New ones are stored as
    x / scale, after the rotation, rounded to nearest even; what is beyond the range becomes its
    end, and NaN becomes 0 in int8.

    Under autocast q, k and v are cast to the cache's dtype, not to autocast's: the cache, which is
    written in place, cannot be. Beside a cache of 8-bit numbers they are cast to autocast's.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (cache_batch, capacity, kv_heads, head_dim) and (..., head_dim_v), in q's
            dtype, or both int8 or float8_e4m3fn. With `block_table` pages: (pages, page_size,
            kv_heads, head_dim), of any size.
        cache_lengths: (batch,), int32 or int64: keys in the cache before the call.
        k, v: (batch, seqlen_new, kv_heads, head_dim), in q's dtype: written into the caches, in
            place, behind `cache_lengths`, then seen.
        block_table: (batch, pages of a sequence), int32 or int64: key j of sequence b lies in page
            block_table[b, j // page_size] at j % page_size.
        cache_indices: (batch,), int32 or int64: the row of the cache that belongs to each sequence;
            default: its own number. Not with `block_table`.
        cache_starts: (batch,), int32 or int64: left padding; earlier keys are hidden.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), floating point: rotate the first
            rotary_dim columns (Su et al. 2021, arXiv:2104.09864) of new key t by position
            cache_lengths + t, and of query i by cache_lengths + i (if neither `causal` nor `window`
            is given, of all queries by cache_lengths), so they must reach the last of these
            positions. They need k and v.
        k_scale, v_scale: (kv_heads,) or (batch, kv_heads), float32, finite and positive: of caches
            of 8-bit numbers, which need both. Fixed as long as the cache is.
        rotary_interleaved: pairs are columns (2c, 2c + 1), else (c, c + rotary_dim / 2).
        causal, window, softmax_scale, softcap, alibi_slopes, sink: as `attention`'s, the diagonal
            and the distances following n; "top_left" is not taken.
        num_splits: None: parts of 256 keys, or of more where a sequence would have too many, by its
            length only: it gets the same bits in a batch of one, in any batch and at any capacity.
            0: as many parts as fill the GPU. n: n parts of each sequence.
        return_lse: return the log-sum-exp of the scores too.
        backend: "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v), in q's dtype, or with `return_lse` the
        pair (out, lse), lse (batch, heads, seqlen_q), float32; float64 of float64.

    Raises:
        TypeError, ValueError: an argument does not fit, or wants a gradient; the message says so.
            The contents of cache_lengths, block_table, k_scale and the like are checked on a CPU,
            and on a GPU, where that waits for the device, if the environment variable
            FASTATTN_CHECK is 1.
            Unchecked, the kernels still touch nothing outside of the tensors.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    rare = (
        block_table, cache_indices, cache_starts, rotary_cos, rotary_sin, k_scale, v_scale,
        alibi_slopes, sink,
    )  # fmt: skip
    plain = (window, backend, num_splits) == (None, None, None) and softcap == 0.0
    if plain and causal is True and not return_lse and rare == NO_FEATURE:
        out = aten.straight(q, k_cache, v_cache, cache_lengths, k, v, softmax_scale)
        if out is not None:
            return out
    autocast = isinstance(q, torch.Tensor) and modes.autocast_enabled(q.device.type)
    if autocast:
        q, k, v = (_as_cached(x, k_cache) for x in (q, k, v))
    try:
        strides = k_cache.stride(-1), v_cache.stride(-1)
        key, plan = _dispatch.find(
            (q, k_cache, v_cache, cache_lengths, k, v, *rare), strides, causal, window,
            softmax_scale, softcap, num_splits, return_lse, backend,
        )  # fmt: skip
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensor, or without a size
        key, plan = None, None
    if plan is None:
        described = describe(
            q, k_cache, v_cache, cache_lengths, k=k, v=v, block_table=block_table,
            cache_indices=cache_indices, cache_starts=cache_starts, rotary_cos=rotary_cos,
            rotary_sin=rotary_sin, k_scale=k_scale, v_scale=v_scale, causal=causal, window=window,
            softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink,
            num_splits=num_splits, return_lse=return_lse,
        )  # fmt: skip
        plan = _dispatch.make(key, described, backend, "attention_with_kv_cache")
    described, run = plan
    problem = described.attention
    call = CacheCall(
        k_cache, v_cache, cache_lengths, k, v, block_table, cache_indices, cache_starts, rotary_cos,
        rotary_sin, k_scale, v_scale, bool(rotary_interleaved),
        problem.bounded_left or problem.bounded_right, num_splits,
    )  # fmt: skip
    if values_are_checked(cache_lengths):
        check_contents(call, problem.seqlen_q)
    extras = NONE
    if alibi_slopes is not None or sink is not None:
        extras = gather(q.dtype, alibi_slopes=alibi_slopes, sink=sink)
    if autocast:  # what had to be cast is, and ATen's functions inside are to compute in that dtype
        with torch.autocast(q.device.type, enabled=False):
            out, lse = run(described, q, extras, call)
    else:
        out, lse = run(described, q, extras, call)
    return (out, cast(torch.Tensor, lse)) if return_lse else out


def _as_cached(x: Any, cache: Any) -> Any:
    """x as autocast casts, to the cache's dtype; what is no tensor is left to the checks."""
    if not (isinstance(x, torch.Tensor) and isinstance(cache, torch.Tensor)):
        return x
    dtype = cache.dtype
    if dtype in stored.DTYPES:
        dtype = torch.get_autocast_dtype(x.device.type)
    return modes.cast(x, dtype) if dtype in DTYPES else x


backends.register(attention_with_kv_cache, describe, BACKENDS)
proving.register("attention_with_kv_cache", _proof.PROOF)
