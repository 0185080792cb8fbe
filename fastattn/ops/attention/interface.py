"""The public functions of attention: describe the call, choose a backend, run it."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch

from fastattn import backends, proving
from fastattn.ops.attention import problem as _problem
from fastattn.ops.attention import proof as _proof
from fastattn.ops.attention import registration, straight
from fastattn.ops.attention.block_mask import BlockMask
from fastattn.ops.attention.call import NONE, Causal, Documents, Features
from fastattn.ops.common import modes
from fastattn.ops.common.dispatch import Dispatch

BACKENDS = registration.BACKENDS

Outputs = tuple[torch.Tensor, torch.Tensor]

_dispatch: Dispatch[_problem.AttentionProblem] = Dispatch(BACKENDS, registration.run_kernel)


def _metadata(x: Any) -> Any:
    """The metadata of documents or a block mask on which a plan depends."""
    if x is None:
        return None
    if isinstance(x, (tuple, list)):
        return tuple(map(_metadata, x))
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype, x.device, x.requires_grad
    if isinstance(x, BlockMask):
        return x.block_size, x.tiles_k, x.seqlens, x.offsets.shape, x.device
    return x


def _cast(x: Any, dtype: torch.dtype, keep: torch.dtype | None = None) -> Any:
    """x as autocast casts; a bias or a sink stays float32, which is more precise."""
    return x if not isinstance(x, torch.Tensor) or x.dtype == keep else modes.cast(x, dtype)


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    document_ids: Documents | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    fp32_precision: str = "ieee",
    deterministic: bool = True,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    document_ids: Documents | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    fp32_precision: str = "ieee",
    deterministic: bool = True,
    return_lse: Literal[True],
    backend: str | None = None,
) -> Outputs: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    document_ids: Documents | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    fp32_precision: str = "ieee",
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | Outputs:
    """Fused softmax attention, out = softmax(softmax_scale * q k^T) v, without the score matrix.

    In plain PyTorch, for q, k, v of shape (batch, heads, seqlen, head_dim):

        scores = softmax_scale * (q @ k.transpose(-2, -1))
        scores = softcap * tanh(scores / softcap)                       # if softcap
        scores = scores - alibi_slopes * |i + seqlen_k - seqlen_q - j|  # if alibi_slopes
        scores = scores + bias                                          # if bias
        scores = scores.masked_fill(~visible, -inf)
        weights = cat([scores, sink]).softmax(-1)[..., :seqlen_k]       # the sink takes a share
        out = dropout(weights) @ v
        lse = cat([scores, sink]).logsumexp(-1)

    The kernels compute it with the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
    tile by tile (FlashAttention, Dao et al. 2022, arXiv:2205.14135; FlashAttention-2, Dao 2023,
    arXiv:2307.08691, for the loop order): memory is linear in the sequence length, and tiles that
    causality, window, lengths, documents or the block mask exclude are never visited. The backward
    adds in one order: the same inputs give the same bits.

    A query that sees no key has output 0, LSE -inf (with a sink: the sink) and zero gradient. Under
    autocast the inputs are cast as F.scaled_dot_product_attention's are.

    Args:
        q: (batch, seqlen_q, heads, head_dim); float16, bfloat16, float32 or float64. Any strides;
            the kernels read them without a copy where the last dimension is contiguous.
        k: (batch, seqlen_k, kv_heads, head_dim), kv_heads dividing heads: query head h reads
            key/value head h // (heads // kv_heads).
        v: (batch, seqlen_k, kv_heads, head_dim_v).
        causal: True or "bottom_right": query i sees the keys j <= i + seqlen_k - seqlen_q, so that
            the last query sees all keys. "top_left": it sees j <= i.
        window: (left, right), with d the diagonal that `causal` names (bottom-right if it is
            False): query i sees the keys i + d - left <= j <= i + d + right; -1 is no bound. Joined
            with `causal` the right side ends at the diagonal.
        softmax_scale: factor of the scores, finite; default 1 / sqrt(head_dim).
        softcap: bound c of the scores, c * tanh(scores / c) (Gemma 2, arXiv:2408.00118); 0 is off.
        bias: added to the scores; float32 or q's dtype, any shape that broadcasts to (batch, heads,
            seqlen_q, seqlen_k). Its gradient is summed over the broadcast dimensions.
        mask: boolean, any shape that broadcasts to (batch, heads, seqlen_q, seqlen_k), True where a
            key may be seen; joined with the other restrictions by "and".
        alibi_slopes: (heads,) or (batch, heads), float32: the slopes of ALiBi (Press et al. 2021,
            arXiv:2108.12409).
        sink: (heads,), float32 or q's dtype: a logit that takes part in the softmax without a value
            (Xiao et al. 2023, arXiv:2309.17453; learnt as in gpt-oss). It has a gradient.
        key_lengths: (batch,), int32 or int64: keys j >= key_lengths[b] are padding. They may hold
            NaN or Inf without effect on outputs and gradients. The diagonal stays that of seqlen_k.
        document_ids: (batch, seqlen), int32 or int64: queries see only the keys of equal number.
            Where seqlen_q and seqlen_k differ, a pair (numbers of q, numbers of k). Tiles are
            skipped where documents lie one after another, as packed ones do.
        block_mask: which tiles of the scores exist; see `fastattn.BlockMask`. Not with `window`.
        dropout_p: probability with which a weight of the softmax is dropped, in [0, 1); the others
            are scaled by 1 / (1 - dropout_p). Seeded by torch's generator of the device.
        fp32_precision: how the kernels multiply float32: "ieee", or "tf32x3", three products on the
            tensor cores that together keep nearly float32's precision.
        deterministic: False lets a backward add dq in any order where that is faster: Hopper's
            Gluon kernels do. Every other backend gives equal bits either way, and so do these
            under torch.use_deterministic_algorithms(True).
        return_lse: return the log-sum-exp of the scores too. Its gradient counts.
        backend: "gluon", "cuda", "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v) in q's dtype; with `return_lse` the pair
        (out, lse), lse (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    plain = (
        bias is None and mask is None and alibi_slopes is None and sink is None
        and key_lengths is None and document_ids is None and block_mask is None
    )  # fmt: skip
    if (
        plain and backend is None and window is None and type(softcap) is type(dropout_p) is float
        and not (softcap or dropout_p or return_lse) and fp32_precision == "ieee"
        and type(deterministic) is bool
    ):  # fmt: skip
        out = straight.run(q, k, v, causal, softmax_scale)
        if out is not None:
            return out
    if isinstance(q, torch.Tensor) and (dtype := modes.autocast_dtype(q.device.type)) is not None:
        q, k, v = (_cast(x, dtype) for x in (q, k, v))
        bias, sink = (_cast(x, dtype, keep=torch.float32) for x in (bias, sink))
    if deterministic is False:  # a plan is kept for the order that it has
        deterministic = torch.are_deterministic_algorithms_enabled()
    numbers = causal, window, softmax_scale, softcap, dropout_p, fp32_precision, deterministic
    tensors: tuple[Any, ...] = ()
    if not plain:
        tensors = mask, bias, alibi_slopes, sink, key_lengths, document_ids, block_mask
    try:
        key, plan = _dispatch.find(
            (q, k, v, *tensors[:5]), numbers, _metadata(document_ids), _metadata(block_mask),
            return_lse, backend,
        )  # fmt: skip
    except (AttributeError, RuntimeError, TypeError):  # no tensor, nested, or of symbolic size
        key, plan = None, None
    if plan is None:
        features = Features(*numbers, *tensors)._asdict()
        described = _problem.describe(q, k, v, **features, return_lse=return_lse)
        plan = _dispatch.make(key, described, backend)
    described, run = plan
    extras = _problem.gather(q.dtype, *tensors) if tensors else NONE
    out, lse = run(described, q, k, v, extras)
    return (out, cast(torch.Tensor, lse)) if return_lse else out


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    **features: Any,
) -> torch.Tensor: ...


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    backend: str | None = None,
    **features: Any,
) -> Outputs: ...


def attention_varlen(  # type: ignore[misc]  # the overloads leave the features open
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    document_ids: Documents | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    fp32_precision: str = "ieee",
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | Outputs:
    """`attention` on sequences of different lengths that lie packed one after another.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1 of q and the keys
    likewise; its result is that of `attention` on it alone. All that `attention` says of the
    features holds with seqlen_q and seqlen_k being the sequence's own.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim) and (total_k, kv_heads, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32 or int64: starts of the sequences and the
            end of the last one; 0 first, not decreasing.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length. None: read from
            cu_seqlens, for which the host waits for a GPU.
        seqused_q, seqused_k: (batch,), int32 or int64: how many of a sequence's tokens there are,
            the first ones; the diagonal follows. Whatever lies after may hold NaN.
        bias, mask: broadcast to (batch, heads, max_seqlen_q, max_seqlen_k), found by the positions
            inside each sequence.
        document_ids: (total,), or a pair of (total_q,) and (total_k,).
        block_mask: made for max_seqlen_q and max_seqlen_k.
        causal, window, softmax_scale, softcap, alibi_slopes, sink, dropout_p, fp32_precision,
            deterministic, return_lse, backend: as `attention`'s.

    Returns:
        out, (total_q, heads, head_dim_v), or with `return_lse` (out, lse), lse (heads, total_q).
        Tokens that are in no sequence have out 0, LSE -inf and zero gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The contents of
            cu_seqlens and seqused are checked on a CPU, and on a GPU, where that waits for the
            device, if the environment variable FASTATTN_CHECK is 1. Unchecked, the kernels still
            read nothing outside of the tensors.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    if isinstance(q, torch.Tensor) and (dtype := modes.autocast_dtype(q.device.type)) is not None:
        q, k, v = (_cast(x, dtype) for x in (q, k, v))
        bias, sink = (_cast(x, dtype, keep=torch.float32) for x in (bias, sink))
    settings, extras = _problem.check_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=seqused_q,
        seqused_k=seqused_k, causal=causal, window=window, softmax_scale=softmax_scale,
        softcap=softcap, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sink=sink,
        document_ids=document_ids, block_mask=block_mask, dropout_p=dropout_p,
        fp32_precision=fp32_precision, deterministic=deterministic,
    )  # fmt: skip
    described = _problem.AttentionProblem.of(q, k, v, extras, settings, return_lse=return_lse)
    _, run = _dispatch.make(None, described, backend, "attention_varlen")
    out, lse = run(described, q, k, v, extras)
    return (out, lse) if return_lse else out


backends.register(attention, _problem.describe_place(_problem.describe), BACKENDS)
backends.register(attention_varlen, _problem.describe_place(_problem.describe_varlen), BACKENDS)
proving.register("attention", _proof.PROOF)
