"""Attention on a key-value cache: public function, checks, plain PyTorch, kernel op.

Inference only: the cache is written in place, and no gradient is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast, overload

import torch

from fastattn import backends
from fastattn.ops.attention import aten, reference
from fastattn.ops.attention import problem as _problem
from fastattn.ops.attention.call import NONE, Extras, Settings
from fastattn.ops.attention.problem import AttentionProblem, Causal, check_index
from fastattn.ops.common import modes

Outputs = tuple[torch.Tensor, torch.Tensor]
# Without the LSE where nobody asks for it.
Run = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

NO_FEATURE = (None,) * 7


class Cache(NamedTuple):
    """Where the keys of a call are, and what happens to q and the new keys on the way."""

    k: torch.Tensor  # (cache_batch, capacity, kv_heads, head_dim); paged: (pages, page_size, ...)
    v: torch.Tensor
    lengths: torch.Tensor  # (batch,) before the call
    new_k: torch.Tensor | None
    new_v: torch.Tensor | None
    block_table: torch.Tensor | None
    indices: torch.Tensor | None
    starts: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    rotary_interleaved: bool
    rotary_advances: bool  # query i stands i after the first one, else all where the first stands
    num_splits: int | None

    @property
    def capacity(self) -> int:
        """Keys that a sequence can have: none if there is no page, or no row."""
        if not self.k.shape[0]:
            return 0
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    @property
    def seqlen_new(self) -> int:
        return 0 if self.new_k is None else self.new_k.shape[1]


@dataclass(frozen=True)
class CacheProblem:
    """Metadata of one call: an attention on `capacity` keys, and how they are found."""

    attention: AttentionProblem
    features: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return self.attention.device

    @property
    def op(self) -> str:
        return "attention_with_kv_cache"

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype

    @property
    def needs_grad(self) -> bool:
        return False

    @property
    def elements(self) -> int | None:
        """The problem's size where backends are compared (measured.py).

        q's elements: how many keys there are, the device knows alone. None as in attention's.
        """
        of = self.attention
        if of.elements is None:
            return None
        return of.batch * of.seqlen_q * of.heads * of.head_dim

    def describe(self) -> str:
        return ", ".join([self.attention.describe(), *self.features])


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

    Under autocast q, k and v are cast to the cache's dtype, not to autocast's: the cache, which is
    written in place, cannot be.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (cache_batch, capacity, kv_heads, head_dim) and (..., head_dim_v), in q's
            dtype. With `block_table` pages: (pages, page_size, kv_heads, head_dim), of any size.
        cache_lengths: (batch,), int32 or int64: keys in the cache before the call.
        k, v: (batch, seqlen_new, kv_heads, head_dim): written into the caches, in place, behind
            `cache_lengths`, then seen.
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
        rotary_interleaved: pairs are columns (2c, 2c + 1), else (c, c + rotary_dim / 2).
        causal, window, softmax_scale, softcap, alibi_slopes, sink: as `attention`'s, the diagonal
            and the distances following n; "top_left" is not taken.
        num_splits: None: parts of 256 keys, or of more where a sequence would have too many, by its
            length only: it gets the same bits in a batch of one, in any batch and at any capacity.
            0: as many parts as fill the GPU. n: n parts of each sequence.
        return_lse: return the log-sum-exp of the scores too.
        backend: "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v), in the cache's dtype, or with `return_lse` the
        pair (out, lse), lse (batch, heads, seqlen_q), float32; float64 of float64.

    Raises:
        TypeError, ValueError: an argument does not fit, or wants a gradient; the message says so.
            The contents of cache_lengths, block_table and the like are checked on a CPU, and on a
            GPU, where that waits for the device, if the environment variable FASTATTN_CHECK is 1.
            Unchecked, the kernels still touch nothing outside of the tensors.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    autocast = isinstance(q, torch.Tensor) and modes.autocast_enabled(q.device.type)
    if autocast:
        q, k, v = (_as_cached(x, k_cache) for x in (q, k, v))
    rare = (
        block_table, cache_indices, cache_starts, rotary_cos, rotary_sin, alibi_slopes, sink
    )  # fmt: skip
    key = plan = None
    if not torch.compiler.is_compiling():
        try:
            key = (
                q.shape, q.dtype, q.device, q.requires_grad,
                k_cache.shape, k_cache.dtype, k_cache.device, k_cache.requires_grad,
                k_cache.stride(-1),
                v_cache.shape, v_cache.dtype, v_cache.device, v_cache.requires_grad,
                v_cache.stride(-1),
                cache_lengths.shape, cache_lengths.dtype, cache_lengths.device,
                k if k is None else (k.shape, k.dtype, k.device, k.requires_grad),
                v if v is None else (v.shape, v.dtype, v.device, v.requires_grad),
                rare if rare == NO_FEATURE else tuple(
                    x if x is None else (x.shape, x.dtype, x.device, x.requires_grad) for x in rare
                ),
                causal, window, softmax_scale, softcap, num_splits, return_lse, backend,
                torch.is_grad_enabled(), modes.transformed(), backends.state(),
            )  # fmt: skip
            plan = _plans.get(key)
        except (AttributeError, TypeError, IndexError):  # an argument is no tensor, or has no size
            key = None
    if plan is None:
        described = describe(
            q, k_cache, v_cache, cache_lengths, k=k, v=v, block_table=block_table,
            cache_indices=cache_indices, cache_starts=cache_starts, rotary_cos=rotary_cos,
            rotary_sin=rotary_sin, causal=causal, window=window, softmax_scale=softmax_scale,
            softcap=softcap, alibi_slopes=alibi_slopes, sink=sink, num_splits=num_splits,
            return_lse=return_lse,
        )  # fmt: skip
        chosen = backends.select("attention_with_kv_cache", BACKENDS, described, backend)
        plan = described.attention, chosen.module.attention_with_kv_cache
        if key is not None:
            if len(_plans) >= 4096:
                _plans.clear()
            _plans[key] = plan
    problem, run = plan
    cache = Cache(
        k_cache, v_cache, cache_lengths, k, v, block_table, cache_indices, cache_starts, rotary_cos,
        rotary_sin, bool(rotary_interleaved), problem.bounded_left or problem.bounded_right,
        num_splits,
    )  # fmt: skip
    if _problem.values_are_checked(cache_lengths):
        _check_contents(cache, problem.seqlen_q)
    extras = _extras(q.dtype, alibi_slopes, sink)
    if autocast:  # what had to be cast is, and ATen's functions inside are to compute in that dtype
        with torch.autocast(q.device.type, enabled=False):
            out, lse = run(problem, q, extras, cache)
    else:
        out, lse = run(problem, q, extras, cache)
    return (out, cast(torch.Tensor, lse)) if return_lse else out


def _as_cached(x: Any, cache: Any) -> Any:
    """x in the cache's dtype, as autocast casts; what is no tensor is left to the checks."""
    tensors = isinstance(x, torch.Tensor) and isinstance(cache, torch.Tensor)
    return modes.cast(x, cache.dtype) if tensors and cache.dtype in _problem.DTYPES else x


# --- checks -------------------------------------------------------------------------------------


def describe(
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
    rotary_interleaved: bool = False,
    causal: Causal = True,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> CacheProblem:
    """The problem of a call. Raises for every error of the caller."""
    _problem.check_tensors(q, k_cache, v_cache, ("batch", "seqlen"), ("q", "k_cache", "v_cache"))
    batch, _, heads, _ = q.shape
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, for it is written in place; got "
                f"the strides {x.stride()}"
            )
    check_index("cache_lengths", cache_lengths, ("batch", batch), q.device)
    _check_new(q, k_cache, v_cache, k, v)
    if block_table is not None:
        if cache_indices is not None:
            raise ValueError(
                "cache_indices and block_table both say where a sequence's keys are: give one"
            )
        _problem.check_device("block_table", block_table, q.device)
        if block_table.dtype not in _problem.INDEX_DTYPES:
            raise TypeError(f"block_table must be int32 or int64; got {block_table.dtype}")
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"block_table must have the shape (batch, pages of a sequence) = ({batch}, ...); "
                f"got {tuple(block_table.shape)}"
            )
    elif cache_indices is not None:
        check_index("cache_indices", cache_indices, ("batch", batch), q.device)
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache must have q's batch size {batch} in dimension 0; got {k_cache.shape[0]}: "
            "give cache_indices, or block_table if these are pages"
        )
    if cache_starts is not None:
        check_index("cache_starts", cache_starts, ("batch", batch), q.device)
    _check_rotary(q, k, rotary_cos, rotary_sin)
    if causal == "top_left":
        raise ValueError("causal must be True or False: a cache has no top-left diagonal")
    left, right = _problem.check_window(causal, window)
    _problem.check_number("softmax_scale", softmax_scale, none=True)
    _problem.check_number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (off) or positive; got {softcap}")
    if alibi_slopes is not None:
        _problem.check_slopes(alibi_slopes, batch, heads, q.device)
    if sink is not None:
        _problem.check_sink(sink, heads, q)
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 0):
        raise ValueError(
            "num_splits must be None (parts of 256 keys), 0 (as many as fill the GPU) or a "
            f"positive int; got {num_splits!r}"
        )
    inputs = q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes, sink
    if modes.needs_grad(*inputs):
        raise ValueError(
            "attention_with_kv_cache is for inference and has no gradient, but an input requires "
            "one: call it under torch.no_grad(), or use attention with k and v as they are"
        )
    settings = Settings(
        window_left=left,
        window_right=right,
        top_left=False,
        softmax_scale=_problem.default_scale(softmax_scale, q),
        softcap=float(softcap),
        dropout_p=0.0,
        fp32_precision="ieee",
        max_seqlen_q=0,
        max_seqlen_k=0,
        block_q=0,
        block_k=0,
    )
    if _problem.values_are_checked(cache_lengths):
        advances = left >= 0 or right >= 0
        cache = Cache(
            k_cache, v_cache, cache_lengths, k, v, block_table, cache_indices, cache_starts,
            rotary_cos, rotary_sin, bool(rotary_interleaved), advances, num_splits,
        )  # fmt: skip
        _check_contents(cache, q.shape[1])
    extras = _extras(q.dtype, alibi_slopes, sink)
    described = _problem.of(q, k_cache, v_cache, extras, settings, return_lse=return_lse)
    named = {
        f"paged by {k_cache.shape[1]}": block_table,
        "cache_indices": cache_indices,
        "cache_starts": cache_starts,
        f"{0 if k is None else k.shape[1]} new keys": k,
        "rotary": rotary_cos,
    }
    features = tuple(name for name, x in named.items() if x is not None)
    return CacheProblem(described, ("kv cache", *features))


def _extras(
    dtype: torch.dtype, alibi_slopes: torch.Tensor | None, sink: torch.Tensor | None
) -> Extras:
    if alibi_slopes is None and sink is None:
        return NONE
    return _problem.gather(dtype, None, None, alibi_slopes, sink, None, None, None)


def _check_new(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
) -> None:
    if (k is None) != (v is None):
        raise ValueError("k and v are appended together: give both or neither")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x is None:
            continue
        _problem.check_device(name, x, q.device)
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} must have the cache's dtype {cache.dtype}; got {x.dtype}")
        expected = (q.shape[0], "seqlen_new", *cache.shape[2:])
        fits = x.dim() == 4 and (x.shape[0], *x.shape[2:]) == (q.shape[0], *cache.shape[2:])
        if not fits or (k is not None and x.shape[1] != k.shape[1]):
            raise ValueError(
                f"{name} must have the shape (batch, seqlen_new, kv_heads, head_dim) = "
                f"({', '.join(map(str, expected))}), seqlen_new the same for both; "
                f"got {tuple(x.shape)}"
            )


def _check_rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
) -> None:
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin belong together: give both or neither")
    if rotary_cos is None or rotary_sin is None:
        return
    if k is None:
        raise ValueError(
            "rotary_cos and rotary_sin rotate q and the new k together: give k and v, or rotate q "
            "before the call if its keys are in the cache already"
        )
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        _problem.check_device(name, x, q.device)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {x.dtype}")
        if x.dim() != 2 or x.shape != rotary_cos.shape or not 0 < 2 * x.shape[1] <= q.shape[3]:
            raise ValueError(
                "rotary_cos and rotary_sin must have one shape (positions, rotary_dim / 2), "
                f"rotary_dim at most head_dim {q.shape[3]}; got {tuple(rotary_cos.shape)} and "
                f"{tuple(rotary_sin.shape)}"
            )
        if not x.shape[0]:
            raise ValueError(f"{name} must have at least one position")


def _check_contents(cache: Cache, seqlen_q: int) -> None:
    """Raise for index tensors that point outside of the cache."""
    new, capacity = cache.seqlen_new, cache.capacity
    lengths = cache.lengths.tolist()
    for b, n in enumerate(lengths):
        if not 0 <= n <= capacity - new:
            room = f"{capacity} keys" + (f" of which {new} are appended now" if new else "")
            raise ValueError(
                f"cache_lengths[{b}] must lie in [0, {capacity - new}], for a sequence's cache has "
                f"room for {room}; got {n}"
            )
    if cache.block_table is not None:
        pages, size = cache.k.shape[:2]
        for b, n in enumerate(lengths):
            used = cache.block_table[b, : -(-(n + new) // max(size, 1))].tolist()
            wrong = [page for page in used if not 0 <= page < pages]
            if wrong:
                raise ValueError(
                    f"block_table[{b}] must hold pages in [0, {pages}) for its {n + new} keys; "
                    f"got {wrong[0]}"
                )
    if cache.indices is not None:
        wrong = [i for i in cache.indices.tolist() if not 0 <= i < cache.k.shape[0]]
        if wrong:
            raise ValueError(
                f"cache_indices must lie in [0, {cache.k.shape[0]}), the rows of the cache; "
                f"got {wrong[0]}"
            )
    if cache.rotary_cos is not None:
        turned = max(new, seqlen_q if cache.rotary_advances else min(seqlen_q, 1))
        last = max(lengths, default=0) + turned - 1
        if lengths and turned and last >= cache.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos and rotary_sin must reach position {last}; they have "
                f"{cache.rotary_cos.shape[0]}"
            )


# --- plain PyTorch: the definition, and ATen one run of equal sequences at a time -----------------


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """x (batch, seqlen, heads, head_dim) turned by positions (batch, seqlen)."""
    half = cos.shape[1]
    precision = modes.at_least_float32(x.dtype)
    positions = positions.clamp(0, cos.shape[0] - 1)
    cos = cos.to(precision)[positions][:, :, None]
    sin = sin.to(precision)[positions][:, :, None]
    turned, rest = x[..., : 2 * half].to(precision), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _appended(cache: Cache) -> torch.Tensor:
    """Write the new keys and values into the cache; the lengths afterwards."""
    lengths = cache.lengths.long().clamp(max=cache.capacity)
    if cache.new_k is None or cache.new_v is None:
        return lengths
    positions = lengths[:, None] + torch.arange(cache.seqlen_new, device=lengths.device)
    k, v = _rotated_keys(cache, cache.new_k, positions), cache.new_v
    rows, slots = _places(cache, positions)
    if not _problem.values_are_checked(cache.lengths):
        fits = (positions >= 0) & (positions < cache.capacity) & (rows >= 0) & (rows < len(cache.k))
        rows, slots, k, v = rows[fits], slots[fits], k[fits], v[fits]
    cache.k[rows, slots] = k
    cache.v[rows, slots] = v
    return lengths + cache.seqlen_new


def _appended_on_host(cache: Cache) -> list[int]:
    """`_appended` on a CPU: plain copies where all sequences end at the same slot."""
    lengths, new = cache.lengths.tolist(), cache.seqlen_new
    if cache.new_k is None or cache.new_v is None:
        return [min(n, cache.capacity) for n in lengths]
    end = lengths[0]
    in_order = cache.block_table is None and cache.indices is None
    if not in_order or lengths.count(end) < len(lengths) or not 0 <= end <= cache.capacity - new:
        return _appended(cache).tolist()
    k = cache.new_k
    if cache.rotary_cos is not None:
        k = _rotated_keys(cache, k, torch.arange(end, end + new)[None])
    cache.k[:, end : end + new] = k
    cache.v[:, end : end + new] = cache.new_v
    return [end + new] * len(lengths)


def _places(cache: Cache, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where positions (batch, n) of the sequences lie: rows and slots of the cache, (batch, n)."""
    if cache.block_table is not None:
        size = cache.k.shape[1]
        page = (positions // max(size, 1)).clamp(0, max(cache.block_table.shape[1] - 1, 0))
        return cache.block_table.long().gather(1, page), positions % max(size, 1)
    rows = cache.indices
    if rows is None:
        rows = torch.arange(positions.shape[0], device=positions.device)
    return rows.long()[:, None].expand_as(positions), positions


def _keys_of(cache: Cache, sequences: slice, start: int, stop: int) -> Outputs:
    """Keys and values from `start` to `stop` of a run of sequences; views, unless in pages.

    Of one sequence alone where a table or indices say where it lies.
    """
    k, v, b = cache.k, cache.v, sequences.start
    if cache.block_table is not None:
        pages = cache.block_table[b, : -(-stop // k.shape[1])]
        # index_select is twice as fast as k[pages]. To gather all sequences at once would be slower
        # again: they would have left the processor's cache when they are read (Xeon, 2026-11-26).
        k, v = (x.index_select(0, pages).flatten(0, 1)[None] for x in (k, v))
    elif cache.indices is not None:
        row = int(cache.indices[b])
        k, v = k[row : row + 1], v[row : row + 1]
    else:
        return k[sequences, start:stop], v[sequences, start:stop]
    return k[:, start:stop], v[:, start:stop]


def _gathered(cache: Cache) -> Outputs:
    """Keys and values of all sequences, (batch, capacity, kv_heads, ...)."""
    positions = torch.arange(cache.capacity, device=cache.k.device)
    positions = positions.expand(len(cache.lengths), -1)
    rows, slots = _places(cache, positions)
    rows, slots = rows.clamp(0, len(cache.k) - 1), slots.clamp(0, cache.k.shape[1] - 1)
    return cache.k[rows, slots], cache.v[rows, slots]


def _rotated_keys(cache: Cache, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if cache.rotary_cos is None or cache.rotary_sin is None:
        return k
    return rotate(k, cache.rotary_cos, cache.rotary_sin, positions, cache.rotary_interleaved)


def _rotated_queries(q: torch.Tensor, cache: Cache) -> torch.Tensor:
    if cache.rotary_cos is None or cache.rotary_sin is None:
        return q
    ahead = torch.arange(q.shape[1], device=q.device) * int(cache.rotary_advances)
    positions = cache.lengths.long()[:, None] + ahead
    return rotate(q, cache.rotary_cos, cache.rotary_sin, positions, cache.rotary_interleaved)


class _Reference:
    """The definition: gather every sequence's keys, then `reference`."""

    @staticmethod
    def unsupported(problem: CacheProblem) -> str | None:
        return None

    @staticmethod
    def attention_with_kv_cache(
        problem: AttentionProblem, q: torch.Tensor, extras: Extras, cache: Cache
    ) -> Outputs:
        q = _rotated_queries(q, cache)
        lengths = _appended(cache).clamp(max=cache.capacity)
        k, v = _gathered(cache)
        return reference.on_lengths(problem, q, k, v, extras, lengths, cache.starts)


class _ATen:
    """The `torch` backend: neighbours of one length together, each run on its keys alone."""

    @staticmethod
    def unsupported(problem: CacheProblem) -> str | None:
        if problem.device.type != "cpu":
            return "ATen has no key-value cache; reading its lengths would stall the device"
        if torch.compiler.is_compiling():
            return "the sequences go through ATen one by one, which cannot be compiled"
        return aten.unsupported(problem.attention)

    @staticmethod
    def attention_with_kv_cache(
        problem: AttentionProblem, q: torch.Tensor, extras: Extras, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q = _rotated_queries(q, cache)
        stops = _appended_on_host(cache)
        starts = [0] * len(stops) if cache.starts is None else cache.starts.tolist()
        slopes = extras.alibi_slopes
        alone = cache.block_table is not None or cache.indices is not None
        alone = alone or (slopes is not None and slopes.shape[0] > 1)
        spans = [(max(start, 0), stop) for start, stop in zip(starts, stops)]
        parts = []
        for first, end in _runs(spans, alone):
            k, v = _keys_of(cache, slice(first, end), *spans[first])
            some = q if end - first == len(spans) else q[first:end]
            parts.append(aten.on_cache(problem, some, k, v, extras, first))
        return aten.joined(parts, out_dim=0, lse_dim=0)


def _runs(spans: list[tuple[int, int]], alone: bool) -> Iterator[tuple[int, int]]:
    """(first, end) of neighbours that are equal; `alone`: of each by itself."""
    first = 0
    for end in range(1, len(spans) + 1):
        if alone or end == len(spans) or spans[end] != spans[first]:
            yield first, end
            first = end


# --- the kernels' way in --------------------------------------------------------------------------

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "attention_with_kv_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_lengths, Tensor? k, Tensor? v, Tensor? block_table, Tensor? cache_indices, "
    "Tensor? cache_starts, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    "bool rotary_advances, SymInt? num_splits, Tensor? alibi_slopes, Tensor? sink, "
    "SymInt window_left, SymInt window_right, float softmax_scale, float softcap, str backend) "
    "-> (Tensor out, Tensor lse)"
)


def _load_cuda() -> ModuleType:
    from fastattn.ops.attention import cuda

    return cuda


def _load_triton() -> ModuleType:
    from fastattn.ops.attention import triton

    return triton


class _Kernel:
    """A kernel backend: its module's answers, its launcher behind the registered op."""

    def __init__(self, name: str, load: Callable[[], ModuleType]) -> None:
        self._name, self._load = name, load

    def unsupported(self, problem: CacheProblem) -> str | None:
        module = self._load()
        if hasattr(module, "unsupported_cache"):
            return module.unsupported_cache(problem)
        return module.unsupported(problem.attention)

    def attention_with_kv_cache(
        self, problem: AttentionProblem, q: torch.Tensor, extras: Extras, cache: Cache
    ) -> Outputs:
        settings = problem.settings
        return torch.ops.fastattn.attention_with_kv_cache(
            q, cache.k, cache.v, cache.lengths, cache.new_k, cache.new_v, cache.block_table,
            cache.indices, cache.starts, cache.rotary_cos, cache.rotary_sin,
            cache.rotary_interleaved, cache.rotary_advances, cache.num_splits, extras.alibi_slopes,
            extras.sink, settings.window_left, settings.window_right, settings.softmax_scale,
            settings.softcap, self._name,
        )  # fmt: skip


_KERNELS = {"cuda": _load_cuda, "triton": _load_triton}


def _run(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, cache_lengths, k, v, block_table, cache_indices, cache_starts, rotary_cos,
    rotary_sin, rotary_interleaved, rotary_advances, num_splits, alibi_slopes, sink, window_left,
    window_right, softmax_scale, softcap, backend,
):  # fmt: skip
    settings = Settings(
        window_left, window_right, False, softmax_scale, softcap, 0.0, "ieee", 0, 0, 0, 0
    )
    extras = Extras(alibi_slopes=alibi_slopes, sink=sink)
    cache = Cache(
        k_cache, v_cache, cache_lengths, k, v, block_table, cache_indices, cache_starts,
        rotary_cos, rotary_sin, rotary_interleaved, rotary_advances, num_splits,
    )  # fmt: skip
    return _KERNELS[backend]().attention_with_kv_cache(q, extras, settings, cache)


def _run_fake(q, k_cache, v_cache, *rest):  # type: ignore[no-untyped-def]
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v_cache.shape[-1]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


_library.impl("attention_with_kv_cache", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_with_kv_cache", _run_fake, lib=_library)

# Everything but the data of a call, checked, and what runs it.
_plans: dict[Any, tuple[AttentionProblem, Run]] = {}

BACKENDS = (
    *(
        backends.Backend(
            name,
            functools.partial(_Kernel, name, load),  # type: ignore[arg-type]
        )
        for name, load in _KERNELS.items()
    ),
    backends.Backend("torch", lambda: _ATen),  # type: ignore[arg-type, return-value]
    backends.Backend("reference", lambda: _Reference),  # type: ignore[arg-type, return-value]
)
backends.register(attention_with_kv_cache, describe, BACKENDS)
