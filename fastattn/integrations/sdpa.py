"""`torch.nn.functional.scaled_dot_product_attention` on `fastattn.attention`, three ways in:

- `scaled_dot_product_attention`, a function of the same arguments;
- `override_sdpa()`, a block inside which torch's own name leads here;
- `register()`, PyTorch's own registry of flash attention implementations
  (`fastattn.integrations.sdpa_flash` says what that replaces).

torch's layout is (..., heads, seqlen, head_dim) with any number of leading dimensions, ours is
(batch, seqlen, heads, head_dim). The way there and back is one of strides.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fastattn.integrations.sdpa_flash import register
from fastattn.ops.attention import attention
from fastattn.ops.attention.call import Causal
from fastattn.ops.common import modes
from fastattn.ops.common.dense import DTYPES, dtype_name

__all__ = ["override_sdpa", "register", "scaled_dot_product_attention"]

_ORIGINAL = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T + attn_mask) value, as F.scaled_dot_product_attention has it.

    Four things are settled here that torch leaves to its kernels:

    - a query that sees no key gives 0, with zero gradients (torch: 0 or NaN, by version and
      kernel);
    - `attn_mask` together with `is_causal` is an error, as torch documents (torch: an error, or
      what both let through, by version and kernel);
    - `key` and `value` of different lengths are an error (its CPU kernel goes by value's);
    - so are a head_dim of 0 and no heads.

    Args:
        query: (..., heads, seqlen_q, head_dim), with any number of leading dimensions, or none and
            no heads; float16, bfloat16, float32 or float64.
        key: (..., kv_heads, seqlen_k, head_dim).
        value: (..., kv_heads, seqlen_k, head_dim_v). All dimensions of the three but the last two
            broadcast, the heads too unless `enable_gqa`.
        attn_mask: broadcastable to (..., heads, seqlen_q, seqlen_k), with two dimensions or more.
            Boolean, True where a key may be seen; or float32 or query's dtype, added to the scores,
            with a gradient; or `torch.nn.attention.bias.causal_upper_left` or `causal_lower_right`
            of (seqlen_q, seqlen_k).
        dropout_p: probability with which a weight is dropped, in [0, 1]. It applies whenever it is
            not 0: pass 0 in evaluation.
        is_causal: query i sees the keys j <= i, whatever the lengths (`fastattn.attention`'s
            "top_left").
        scale: factor of the scores, default 1 / sqrt(head_dim).
        enable_gqa: the heads of key and value divide those of query; query head h reads
            h // (heads // kv_heads).

    Returns:
        (..., heads, seqlen_q, head_dim_v), a view of a (..., seqlen_q, heads, head_dim_v) tensor.
        Nothing is copied on the way, except where broadcast dimensions besides one batch and the
        heads are more than a stride can say, or where key and value differ in their heads.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    call = _translate(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _run(call)


@contextlib.contextmanager
def override_sdpa() -> Iterator[None]:
    """Let `torch.nn.functional.scaled_dot_product_attention` run on fastattn inside the block.

    The attribute of `torch.nn.functional` is replaced, process-wide, from the first such block to
    be entered to the last one to be left, in whatever order and in whatever threads, by an
    exception too. So code that looks the function up when it calls is reached
    (`F.scaled_dot_product_attention(...)`, which is how torch's own modules, transformers and
    diffusers call it); a module that did `from torch.nn.functional import
    scaled_dot_product_attention` beforehand keeps the original, and so does what `torch.compile`
    has compiled before. What others put into the attribute meanwhile is left there, and called;
    if it calls what it found there, that is fastattn inside the blocks, and torch afterwards.

    A call that fastattn does not take goes to the original as it is: nested tensors and other
    subclasses of Tensor, dtypes that are not floating point of 16, 32 or 64 bits, a mask with
    `is_causal`, and whatever `scaled_dot_product_attention` refuses, so that wrong arguments meet
    torch's own errors. A subclass may ask whether it is torch's attribute that was called, so that
    the original is back in its place during such a call: other threads run on it for that time.
    The choice of `torch.nn.attention.sdpa_kernel` has no say in the other calls.
    """
    _standing.change(blocks=1)
    try:
        yield
    finally:
        _standing.change(blocks=-1)


class _Standing:
    """Which function stands in torch.nn.functional: a matter of counts, not of who came last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0  # of override_sdpa that are open
        self.lent = 0  # calls under way that need the original in its place
        self.active = False  # blocks > 0, for calls to read
        self.before: Any = _ORIGINAL  # what stood there when the first block was entered
        self.placed: Any = _ORIGINAL  # what we put there last

    def change(self, *, blocks: int = 0, lent: int = 0) -> None:
        # torch.compile, tracing a block, knows no locks, and guards what it reads here.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self.lock:
            self._change(blocks, lent)

    def _change(self, blocks: int, lent: int) -> None:
        functional: Any = F
        found = functional.scaled_dot_product_attention
        if self.blocks == 0 and blocks > 0:
            self.placed = found
            if found is not _rerouted:  # which others may have put back
                self.before = found
        self.blocks += blocks
        self.lent += lent
        self.active = self.blocks > 0
        if found is self.placed:
            inside = _ORIGINAL if self.lent else _rerouted
            self.placed = inside if self.active else self.before
            functional.scaled_dot_product_attention = self.placed


_standing = _Standing()


def _rerouted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """The function in torch.nn.functional during `override_sdpa`."""
    if _standing.active:
        call = _taken(query, key, value, attn_mask, *rest, **options)
        if call is not None:
            return _run(call)
    if _are_plain(query, key, value, attn_mask):
        if query is not None and query.shape[-3:-2] == (0,):
            # No heads, so no elements. torch 2.11 divides by their number on a CPU: a SIGFPE.
            return query @ key.mT @ value
        return _ORIGINAL(query, key, value, attn_mask, *rest, **options)
    # A subclass may compare the function that was called with torch's attribute.
    _standing.change(lent=1)
    try:
        return _ORIGINAL(query, key, value, attn_mask, *rest, **options)
    finally:
        _standing.change(lent=-1)


def fused_or_original(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """`scaled_dot_product_attention`, and torch's own for calls that fastattn does not take.

    For code that calls torch's by name: see `override_sdpa` for the calls that are torch's.
    """
    call = _taken(query, key, value, attn_mask, *rest, **options)
    if call is not None:
        return _run(call)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)


def _taken(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any, **options: Any
) -> _Call | None:
    """The call for `attention`, None for one that is left to torch."""
    if not _are_plain(query, key, value):
        return None
    if type(attn_mask) is not CausalBias and not _are_plain(attn_mask):
        return None
    try:
        return _translate(query, key, value, attn_mask, *rest, **options)
    except (TypeError, ValueError):  # from the checks of metadata only; nothing has run
        return None


def _are_plain(*tensors: Any) -> bool:
    """Whether these are Tensors as such, or none."""
    return all(
        x is None or (type(x) in (Tensor, torch.nn.Parameter) and not x.is_nested) for x in tensors
    )


# --- the translation ----------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of F.sdpa as one of `attention`."""

    q: Tensor  # (batch, seqlen_q, heads, head_dim)
    k: Tensor  # (batch, seqlen_k, kv_heads, head_dim)
    v: Tensor  # (batch, seqlen_k, kv_heads, head_dim_v)
    mask: Tensor | None
    bias: Tensor | None
    dropout_p: float
    causal: Causal
    scale: float | None
    leading: tuple[int, ...]  # the dimensions that became the batch
    has_heads: bool


def _run(call: _Call) -> Tensor:
    v, dropout_p = call.v, call.dropout_p
    if dropout_p == 1.0:  # every weight is dropped: nothing is left of v, nor of any gradient
        v = v.masked_fill(torch.ones((), dtype=torch.bool, device=v.device), 0.0)
        dropout_p = 0.0
    out = attention(
        call.q,
        call.k,
        v,
        causal=call.causal,
        softmax_scale=call.scale,
        bias=call.bias,
        mask=call.mask,
        dropout_p=dropout_p,
    )
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if len(call.leading) == 1:
        return out
    if call.leading:
        return out.unflatten(0, call.leading)
    return out[0] if call.has_heads else out[0, 0]


def _translate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> _Call:
    """Views of the arguments in our layout; raises for whatever the op would not take."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(x, Tensor) and not (x is None and name == "attn_mask"):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
        if x is not None and x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor: use fastattn.attention_varlen(q, k, v, cu_seqlens_q, "
                "cu_seqlens_k) on its values, or torch.nn.functional.scaled_dot_product_attention"
            )
    corner = None
    if isinstance(attn_mask, CausalBias):
        corner, attn_mask = attn_mask, None
    if (dtype := modes.autocast_dtype(query.device.type)) is not None:  # the mask too, as in torch
        query, key, value = (modes.cast(x, dtype) for x in (query, key, value))
        attn_mask = None if attn_mask is None else modes.cast(attn_mask, dtype)
    if scale is not None and not isinstance(scale, (int, float)):
        scale = float(scale)  # a tensor of one element, a number of numpy
    _check(query, key, value, attn_mask, dropout_p, is_causal, scale)
    causal: Causal = "top_left" if is_causal else False
    if corner is not None:
        causal = _causality(corner, query, key, is_causal)
    leading = _leading(query, key, value)
    heads, kv_heads = _heads(query, key, value, enable_gqa)
    rank = max(query.dim(), key.dim(), value.dim())
    mask = bias = None
    if attn_mask is not None:
        scores = (*leading, heads, query.shape[-2], key.shape[-2])[-rank:]
        attn_mask = _four_dimensional(attn_mask, scores)
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    return _Call(
        q=_in_our_layout(query, leading, heads, enable_gqa),
        k=_in_our_layout(key, leading, kv_heads, enable_gqa),
        v=_in_our_layout(value, leading, kv_heads, enable_gqa),
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        causal=causal,
        scale=scale,
        leading=leading,
        has_heads=rank > 2,
    )


def _causality(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> Causal:
    """Torch's object for a causal mask as `attention` has it."""
    if is_causal:
        raise ValueError("attn_mask is a causal bias already: leave is_causal False")
    size, lengths = (bias.seq_len_q, bias.seq_len_kv), (query.shape[-2], key.shape[-2])
    if size != lengths:
        raise ValueError(
            f"attn_mask is a causal bias of {size}; it must have the lengths of query and key, "
            f"{lengths}"
        )
    return "top_left" if bias.variant == CausalVariant.UPPER_LEFT else "bottom_right"


def _leading(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The dimensions in front of the heads, broadcast."""
    leading = query.shape[:-3]
    if key.shape[:-3] == leading == value.shape[:-3]:
        return tuple(leading)
    try:
        return tuple(torch.broadcast_shapes(leading, key.shape[:-3], value.shape[:-3]))
    except RuntimeError as error:
        raise ValueError(
            "the leading dimensions of query, key and value must broadcast; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        ) from error


def _heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int]:
    """The heads of the queries, and of the keys and values."""
    q, k, v = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    if enable_gqa:
        if k == 0 or v == 0 or q % k or q % v:
            raise ValueError(
                f"enable_gqa: the heads of key and value must divide query's {q}; got {k} and {v}"
            )
        return q, math.lcm(k, v)
    heads = next((n for n in (q, k, v) if n != 1), 1)
    if heads == 0 or any(n not in (1, heads) for n in (q, k, v)):
        fix = " (enable_gqa=True shares heads of key and value)" if k == v and q != k else ""
        raise ValueError(
            "the heads (third dimension from the end) of query, key and value must broadcast, and "
            f"be at least 1; got {q}, {k} and {v}{fix}"
        )
    return heads, 1 if k == v == 1 else heads  # one head for all needs no expansion


def _in_our_layout(x: Tensor, leading: tuple[int, ...], heads: int, enable_gqa: bool) -> Tensor:
    """(..., [heads,] seqlen, dim) -> (batch, seqlen, heads, dim)."""
    if x.dim() == 2:
        x = x[None]
    if x.shape[-3] != heads and enable_gqa and x.shape[-3] != 1:
        x = x.repeat_interleave(heads // x.shape[-3], dim=-3)
    if x.shape[:-3] != leading or x.shape[-3] != heads:
        x = x.expand(*leading, heads, *x.shape[-2:])
    if not leading:
        x = x[None]
    elif len(leading) > 1:
        x = x.flatten(0, len(leading) - 1)
    return x.transpose(1, 2)


def _four_dimensional(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """A mask for scores of any rank as (batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1)."""
    fits = 2 <= mask.dim() <= len(scores)
    if not fits or any(n not in (1, s) for n, s in zip(mask.shape[::-1], scores[::-1])):
        raise ValueError(
            f"attn_mask must broadcast to (..., seqlen_q, seqlen_k) = {scores} and have 2 to "
            f"{len(scores)} dimensions; got {tuple(mask.shape)}"
        )
    if mask.dim() <= 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if len(scores) <= 4:
        return mask
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    leading = scores[:-3]
    return mask.expand(*leading, *mask.shape[-3:]).flatten(0, len(leading) - 1)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> None:
    """Raise for what the op would not take, in the words of this signature."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2 or x.shape[-1] == 0:
            raise ValueError(
                f"{name} must be (..., seqlen, head_dim) with a head_dim of at least 1; "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            accepted = ", ".join(map(dtype_name, DTYPES))
            raise TypeError(f"{name} must have one of the dtypes {accepted}; got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}; got {x.device}")
        if x.dtype != query.dtype:
            raise TypeError(
                f"query, key and value must have one dtype; got query {query.dtype}, "
                f"{name} {x.dtype}: cast them to the same"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have query's head_dim {query.shape[-1]}; got shape {tuple(key.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value must have key's seqlen {key.shape[-2]}; got shape {tuple(value.shape)}"
        )
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool; got {type(is_causal).__name__}")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1]; got {dropout_p!r}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite; got {scale}")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other: put the diagonal into the mask, "
            "attn_mask & torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril()"
        )
    if attn_mask.device != query.device:
        raise ValueError(
            f"attn_mask must be on query's device {query.device}; got {attn_mask.device}"
        )
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask must be boolean, float32 or of query's dtype {query.dtype}; "
            f"got {attn_mask.dtype}"
        )
