"""flash-attn 2.8's functions: its names, signatures and return values; run on fastattn's ops.

Causal masks and windows are aligned bottom-right, as flash-attn has had them since 2.1. With
seqlen_q = 2 and seqlen_k = 5, and with 5 and 2, causal=True shows (1) and hides (0):

    1 1 1 1 0        0 0
    1 1 1 1 1        0 0
                     0 0
                     1 0
                     1 1

Differences from flash-attn 2.8:

- More runs: every device, dtype and head_dim that `fastattn.attention` takes, v with a head_dim of
  its own, softcap together with dropout, gradients through `softmax_lse` (flash-attn drops them),
  pages of any size, int64 where flash-attn wants int32.
- Under autocast the inputs are cast, by `flash_attn_with_kvcache` to the cache's dtype, by the
  others to autocast's. (flash-attn keeps their dtype, which must be one.)
- `deterministic` is `fastattn.attention`'s: only Hopper's Gluon kernels have another backward
  without it, and none under torch.use_deterministic_algorithms(True).
- S_dmask, the third result with return_attn_probs=True, is None: the probabilities are never
  formed. flash-attn has them only for its tests, and not without dropout.
- `softmax_lse` is the LSE of the documented scores in two cases where flash-attn's is not: a query
  that sees no key has -inf (flash-attn: inf, or -inf where it splits the keys), and with ALiBi and
  causal=True no constant of the row is missing from it.
- An unbounded side of a window is unbounded for any lengths (flash-attn's reaches seqlen_k keys
  from the diagonal: on the right too few for the first queries where seqlen_q > seqlen_k + 1).

Arguments that all functions share:

    dropout_p: probability with which a weight of the softmax is dropped.
    softmax_scale: factor of the scores; default 1 / sqrt(head_dim).
    window_size: (left, right): query i sees the keys from i + seqlen_k - seqlen_q - left to
        i + seqlen_k - seqlen_q + right; a negative side is unbounded.
    softcap: scores become softcap * tanh(score / softcap); 0 or less: they stay as they are.
    alibi_slopes: (heads,) or (batch, heads), float32: scores get
        -slope * |i + seqlen_k - seqlen_q - j|.
    return_attn_probs: return (out, softmax_lse, None) instead of out; softmax_lse is float32,
        (batch, heads, seqlen_q), or (heads, total_q) of the varlen functions.

Numbers and flags may be Python's, numpy's, or tensors with one element; of a tensor on a GPU the
host waits for the value.

Errors are those of the ops underneath (TypeError, ValueError, fastattn.UnsupportedError), under
their names of the arguments; a block_table of a cache that is too short is a RuntimeError, as
flash-attn's.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch

from fastattn.flash_attn.pages import gathered
from fastattn.ops.attention import attention, attention_varlen, attention_with_kv_cache
from fastattn.ops.attention.problem import values_are_checked


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q, (batch, seqlen_q, heads, head_dim), to k and v, (batch, seqlen_k, kv_heads,
    head_dim); kv_heads divides heads. Returns out, shaped as q, or with `return_attn_probs` the
    triple of the module's text, which has the other arguments too.
    """
    features = _features(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip
    return _returned(attention(q, k, v, **features), return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor, (batch, seqlen_k, 2, kv_heads, head_dim)."""
    k, v = _unpacked("kv", kv, "(batch, seqlen, 2, kv_heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor, (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = _unpacked("qkv", qkv, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """Attention of packed sequences: `cu_seqlens_q` and `cu_seqlens_k`, (batch + 1,), say where
    each begins in q, (total_q, heads, head_dim), and in k and v, (total_k, kv_heads, head_dim).
    Returns out, shaped as q, or with `return_attn_probs` the triple of the module's text.

    With `block_table`, (batch, max_pages), k and v are pages, (pages, page_size, kv_heads,
    head_dim): row b names the pages of sequence b, of which the first
    cu_seqlens_k[b + 1] - cu_seqlens_k[b] tokens count. The pages are gathered into
    (batch, max_seqlen_k, ...) first, a copy of that size; `flash_attn_with_kvcache` reads pages in
    place.
    """
    max_seqlen_q = _integer("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = _integer("max_seqlen_k", max_seqlen_k)
    seqused_k = None
    if block_table is not None:
        k, v, cu_seqlens_k, max_seqlen_k, seqused_k = gathered(
            k, v, block_table, cu_seqlens_k, max_seqlen_k
        )
    features = _features(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip
    outputs = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        seqused_k=seqused_k, **features,
    )  # fmt: skip
    return _returned(outputs, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor, (total_k, 2, kv_heads, head_dim)."""
    k, v = _unpacked("kv", kv, "(total, 2, kv_heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor, (total, 3, heads, head_dim)."""
    q, k, v = _unpacked("qkv", qkv, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new queries to a cache of keys and values, which may grow by the same call.

    As flash-attn's it has no gradient: it runs without grad mode, whatever requires grad.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (cache_batch, capacity, kv_heads, head_dim), or with `block_table`
            (pages, page_size, kv_heads, head_dim). With neither that nor `cache_batch_idx` the
            first `batch` rows count.
        k, v: (batch, seqlen_new, kv_heads, head_dim), written into the caches, in place, after
            their first `cache_seqlens` tokens, before the attention. They need `cache_seqlens`.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2): rotate k at cache_seqlens + t, and q at
            cache_seqlens + i, or all of q at cache_seqlens with neither causal nor a window. They
            need k and v.
        cache_seqlens: (batch,), how many tokens of the cache count before the call; an int is that
            many for every sequence, None the whole capacity.
        cache_batch_idx: (batch,), the row of the cache that belongs to each sequence; not with
            `block_table`.
        cache_leftpad: (batch,), the first token of each sequence that counts.
        block_table: (batch, max_pages), the pages of each sequence.
        rotary_interleaved: True rotates the pairs (2c, 2c + 1), False (c, c + rotary_dim / 2).
        num_splits: parts into which the keys are cut and worked on at the same time; 0: as the
            device's occupancy wants it.
        return_softmax_lse: return (out, softmax_lse).

    The diagonal of causal and windows is aligned bottom-right on the length after appending. The
    other arguments, and what differs from flash-attn, are in the module's text.

    Raises:
        ValueError: k without cache_seqlens; and as the op underneath.
        RuntimeError: block_table has too few pages for cache_seqlens and the new keys, as
            flash-attn says it. Where cache_seqlens is a tensor on a GPU that is not looked at,
            unless FASTATTN_CHECK=1: no key beyond the pages is read or written.
    """
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(
                "k is written after the first cache_seqlens tokens of the cache: give "
                "cache_seqlens, an int or (batch,), with k; 0 for an empty cache"
            )
        cache_seqlens = k_cache.shape[1]
        if block_table is not None:
            cache_seqlens *= block_table.shape[1]
    batch = q.shape[0]
    if not isinstance(cache_seqlens, torch.Tensor) or not cache_seqlens.dim():
        filled = _integer("cache_seqlens", cache_seqlens)
        _check_pages(block_table, k_cache, k, filled)
        cache_seqlens = torch.full((batch,), filled, dtype=torch.int32, device=q.device)
    elif block_table is not None and values_are_checked(cache_seqlens) and cache_seqlens.numel():
        _check_pages(block_table, k_cache, k, int(cache_seqlens.max()))
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] > batch:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    with torch.no_grad():
        return attention_with_kv_cache(
            q, k_cache, v_cache, cache_seqlens, k=k, v=v,
            block_table=block_table, cache_indices=cache_batch_idx, cache_starts=cache_leftpad,
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
            causal=_flag("causal", causal), window=_window(window_size),
            softmax_scale=_number("softmax_scale", softmax_scale), softcap=_softcap(softcap),
            alibi_slopes=alibi_slopes, num_splits=_integer("num_splits", num_splits),
            return_lse=return_softmax_lse,
        )  # fmt: skip


def _check_pages(
    block_table: torch.Tensor | None, k_cache: torch.Tensor, k: torch.Tensor | None, filled: int
) -> None:
    """Raise flash-attn's type of error if the longest sequence has no room; shapes are the op's."""
    if block_table is None or block_table.dim() != 2:
        return
    new = 0 if k is None or k.dim() != 4 else k.shape[1]
    columns, size = block_table.shape[1], k_cache.shape[1]
    if filled + new > columns * size:
        raise RuntimeError(
            f"block_table has {columns} pages of {size} keys for a sequence, room for "
            f"{columns * size}; cache_seqlens and the new keys need {filled + new}: give "
            "block_table more columns"
        )


def _features(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """The shared arguments under our names."""
    return {
        "causal": _flag("causal", causal),
        "window": _window(window_size),
        "softmax_scale": _number("softmax_scale", softmax_scale),
        "softcap": _softcap(softcap),
        "alibi_slopes": alibi_slopes,
        "dropout_p": _number("dropout_p", dropout_p),
        "deterministic": _flag("deterministic", deterministic),
        "return_lse": return_attn_probs,
    }


def _window(window_size: Sequence[int]) -> tuple[int, int] | None:
    """Our window, None where both sides are unbounded: flash-attn says so by any negative."""
    try:
        left, right = (max(operator.index(side), -1) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            "window_size must be two integers, (left, right), negative for an unbounded side; "
            f"got {window_size!r}"
        ) from None
    return None if left == right == -1 else (left, right)


def _softcap(softcap: float) -> float:
    softcap = _number("softcap", softcap)
    return 0.0 if isinstance(softcap, (int, float)) and softcap < 0.0 else softcap


def _integer(name: str, value: Any) -> Any:
    """An int of numpy's integers and of tensors with one; ints, symbolic ones and None stay."""
    if value is None or isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an integer; got {value!r}") from None


def _number(name: str, value: Any) -> Any:
    """A float of numpy's numbers and of tensors with one; other numbers and None stay."""
    if value is None or isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    if hasattr(value, "__float__"):  # a string has none, though float takes it
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    raise TypeError(f"{name} must be a number; got {value!r}")


def _flag(name: str, value: Any) -> bool:
    """A bool of whatever is true or false, but not of a word: "top_left" would be true."""
    if not isinstance(value, str):
        with contextlib.suppress(ValueError, RuntimeError):
            return bool(value)
    raise TypeError(f"{name} must be True or False; got {value!r}")


def _returned(outputs: Any, return_attn_probs: bool) -> Any:
    """out, or (out, softmax_lse, S_dmask)."""
    return (*outputs, None) if return_attn_probs else outputs


def _unpacked(name: str, packed: torch.Tensor, layout: str) -> tuple[torch.Tensor, ...]:
    """Views of the tensors in `packed`; the number in the third dimension from the end of `layout`
    says how many there are.
    """
    dimensions = layout.strip("()").split(", ")
    if packed.dim() != len(dimensions) or packed.shape[-3] != int(dimensions[-3]):
        raise ValueError(f"{name} must be {layout}; got {tuple(packed.shape)}")
    return packed.unbind(-3)
