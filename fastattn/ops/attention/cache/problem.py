"""A call on a key-value cache apart from its data, and every error that a user can make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastattn.ops.attention.cache import stored
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.call import Causal, Features
from fastattn.ops.attention.problem import (
    AttentionProblem,
    check_block_table,
    check_device,
    check_features,
    check_index,
    check_tensors,
    values_are_checked,
)
from fastattn.ops.common import modes
from fastattn.ops.common.dense import dtype_name


@dataclass(frozen=True)
class CacheProblem:
    """Metadata of one call: an attention on `capacity` keys, and how they are found."""

    attention: AttentionProblem
    given: tuple[str, ...]  # names of the optional tensors that are there
    stored: torch.dtype  # of the caches
    page_size: int
    seqlen_new: int

    @property
    def device(self) -> torch.device:
        return self.attention.device

    op = "attention_with_kv_cache"

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype

    @property
    def needs_grad(self) -> bool:
        return False

    @property
    def elements(self) -> int | None:
        """The problem's size where backends are compared (measured.py).

        q's elements: only the device knows how many keys there are. None as in attention's.
        """
        of = self.attention
        if of.elements is None:
            return None
        return of.batch * of.seqlen_q * of.heads * of.head_dim

    def describe(self) -> str:
        named = {
            "k_scale": f"stored as {dtype_name(self.stored)}",
            "block_table": f"paged by {self.page_size}",
            "cache_indices": "cache_indices",
            "cache_starts": "cache_starts",
            "k": f"{self.seqlen_new} new keys",
            "rotary_cos": "rotary",
        }
        features = (told for name, told in named.items() if name in self.given)
        return ", ".join([self.attention.describe(), "kv cache", *features])


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    num_splits: int | None = None,
    return_lse: bool = False,
    causal: Causal = True,
    **features: Any,
) -> CacheProblem:
    """The problem of a call. Raises for every error of the caller."""
    names = "q", "k_cache", "v_cache"
    check_tensors(q, k_cache, v_cache, ("batch", "seqlen"), names, stored=stored.DTYPES)
    batch = q.shape[0]
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, for it is written in place; got "
                f"the strides {x.stride()}"
            )
    check_index("cache_lengths", cache_lengths, ("batch", batch), q.device)
    _check_scales(q, k_cache, v_cache, k_scale, v_scale)
    _check_new(q, k_cache, v_cache, k, v)
    if block_table is not None:
        if cache_indices is not None:
            raise ValueError(
                "cache_indices and block_table both say where a sequence's keys are: give one"
            )
        check_block_table(block_table, batch, q.device)
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
    given = Features(causal, **features)
    settings, extras = check_features(q, batch, q.shape[1], k_cache.shape[1], given)
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 0):
        raise ValueError(
            "num_splits must be None (parts of 256 keys), 0 (as many as fill the GPU) or a "
            f"positive int; got {num_splits!r}"
        )
    inputs = q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, k_scale, v_scale
    if modes.needs_grad(*inputs, *given.tensors):
        raise ValueError(
            "attention_with_kv_cache is for inference and has no gradient, but an input requires "
            "one: call it under torch.no_grad(), or use attention with k and v as they are"
        )
    if values_are_checked(cache_lengths):
        advances = settings.window_left >= 0 or settings.window_right >= 0
        cache = CacheCall(
            k_cache, v_cache, cache_lengths, k, v, block_table, cache_indices, cache_starts,
            rotary_cos, rotary_sin, k_scale, v_scale, bool(rotary_interleaved), advances,
            num_splits,
        )  # fmt: skip
        check_contents(cache, q.shape[1])
    described = AttentionProblem.of(q, k_cache, v_cache, extras, settings, return_lse=return_lse)
    optional = {
        "k": k, "k_scale": k_scale, "block_table": block_table, "cache_indices": cache_indices,
        "cache_starts": cache_starts, "rotary_cos": rotary_cos,
    }  # fmt: skip
    return CacheProblem(
        attention=described,
        given=tuple(name for name, x in optional.items() if x is not None),
        stored=k_cache.dtype,
        page_size=k_cache.shape[1],
        seqlen_new=0 if k is None else k.shape[1],
    )


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
        check_device(name, x, q.device)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {x.dtype}")
        expected = (q.shape[0], "seqlen_new", *cache.shape[2:])
        fits = x.dim() == 4 and (x.shape[0], *x.shape[2:]) == (q.shape[0], *cache.shape[2:])
        if not fits or (k is not None and x.shape[1] != k.shape[1]):
            raise ValueError(
                f"{name} must have the shape (batch, seqlen_new, kv_heads, head_dim) = "
                f"({', '.join(map(str, expected))}), seqlen_new the same for both; "
                f"got {tuple(x.shape)}"
            )


def _check_scales(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """The scales of a cache of 8-bit numbers, which no other cache has."""
    if k_cache.dtype != v_cache.dtype:
        raise TypeError(
            f"k_cache and v_cache must have one dtype; got {k_cache.dtype} and {v_cache.dtype}"
        )
    held = k_cache.dtype in stored.DTYPES
    batch, kv_heads = q.shape[0], k_cache.shape[2]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if held != (scale is not None):
            raise ValueError(
                f"{name} must be given for a cache of 8-bit numbers, int8 or float8_e4m3fn, and "
                f"for no other one; got {'one' if scale is not None else 'none'} for a cache of "
                f"{k_cache.dtype}"
            )
        if scale is None:
            continue
        check_device(name, scale, q.device)
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {scale.dtype}: cast it by .float()")
        fits = scale.dim() in (1, 2) and scale.shape[-1] == kv_heads
        if not fits or (scale.dim() == 2 and scale.shape[0] != batch):
            raise ValueError(
                f"{name} must have the shape (kv_heads,) = ({kv_heads},) or (batch, kv_heads) = "
                f"({batch}, {kv_heads}); got {tuple(scale.shape)}"
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
        check_device(name, x, q.device)
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


def check_contents(cache: CacheCall, seqlen_q: int) -> None:
    """Raise for index tensors that point outside of the cache, and scales of no use."""
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
    for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        wrong_scales = [] if scale is None else scale[~((scale > 0) & scale.isfinite())].tolist()
        if wrong_scales:
            raise ValueError(
                f"{name} must be finite and positive; got {wrong_scales[0]}: of a head of zeros "
                "any scale will do"
            )
    if cache.rotary_cos is not None:
        turned = max(new, seqlen_q if cache.rotary_advances else min(seqlen_q, 1))
        last = max(lengths, default=0) + turned - 1
        if lengths and turned and last >= cache.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos and rotary_sin must reach position {last}; they have "
                f"{cache.rotary_cos.shape[0]}"
            )
