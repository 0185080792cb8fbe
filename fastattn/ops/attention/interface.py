"""The public function of attention: describe the call, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch

from fastattn import backends
from fastattn.ops.attention import aten, reference, registration
from fastattn.ops.attention import problem as _problem
from fastattn.ops.common import modes
from fastattn.ops.common.plans import PlanCache

BACKENDS = (
    *registration.KERNELS,
    backends.Backend("torch", lambda: aten),
    backends.Backend("reference", lambda: reference),
)

Outputs = tuple[torch.Tensor, torch.Tensor]

_plans: PlanCache[tuple[_problem.AttentionProblem, Callable[..., Any]]] = PlanCache()


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> Outputs: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | Outputs:
    """Fused softmax attention, out = softmax(softmax_scale * q k^T) v, without the score matrix.

    In plain PyTorch, for q, k, v of shape (batch, heads, seqlen, head_dim):

        scores = softmax_scale * (q @ k.transpose(-2, -1))
        scores = scores.masked_fill(~visible, -inf)
        out = scores.softmax(-1) @ v
        lse = scores.logsumexp(-1)

    The kernels compute it with the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
    tile by tile (FlashAttention, Dao et al. 2022, arXiv:2205.14135; FlashAttention-2, Dao 2023,
    arXiv:2307.08691, for the loop order): memory is linear in the sequence length. The backward has
    no atomics: the same inputs give the same bits.

    A query that sees no key has output 0, LSE -inf and zero gradients. Under autocast the inputs
    are cast as F.scaled_dot_product_attention's are.

    Args:
        q: (batch, seqlen_q, heads, head_dim); float16, bfloat16, float32 or float64. Any strides;
            the kernels read them without a copy where the last dimension is contiguous.
        k: (batch, seqlen_k, kv_heads, head_dim), kv_heads dividing heads: query head h reads
            key/value head h // (heads // kv_heads).
        v: k's shape.
        causal: query i sees the keys j <= i + seqlen_k - seqlen_q (aligned bottom-right, so that
            the last query sees all keys).
        softmax_scale: factor of the scores, finite; default 1 / sqrt(head_dim).
        mask: boolean, (batch or 1, heads or 1, seqlen_q or 1, seqlen_k), True where a key may be
            seen; joined with the other restrictions by "and".
        key_lengths: (batch,), int32 or int64: keys j >= key_lengths[b] are padding. They may hold
            NaN or Inf without effect on outputs and gradients. The causal diagonal stays that of
            seqlen_k.
        dropout_p: probability with which a weight of the softmax is dropped, in [0, 1); the others
            are scaled by 1 / (1 - dropout_p). Seeded by torch's generator.
        return_lse: return the log-sum-exp of the scores too. Its gradient counts.
        backend: "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        out, (batch, seqlen_q, heads, head_dim) in q's dtype; with `return_lse` the pair (out, lse),
        lse (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    try:
        if (dtype := modes.autocast_dtype(q.device.type)) is not None:
            q, k, v = modes.cast(q, dtype), modes.cast(k, dtype), modes.cast(v, dtype)
        if torch.compiler.is_compiling():
            key, plan = None, None
        else:
            key = (
                q.shape, q.dtype, q.device, q.requires_grad,
                k.shape, k.dtype, k.device, k.requires_grad,
                v.shape, v.dtype, v.device, v.requires_grad,
                mask if mask is None else (mask.shape, mask.dtype, mask.device),
                key_lengths
                if key_lengths is None
                else (key_lengths.shape, key_lengths.dtype, key_lengths.device),
                causal, softmax_scale, dropout_p, return_lse, backend,
                torch.is_grad_enabled(), modes.transformed(), backends.state(),
            )  # fmt: skip
            plan = _plans.get(key)
    except (AttributeError, TypeError):  # an argument is no tensor (or a size is symbolic)
        key, plan = None, None
    if plan is None:
        described = _problem.describe(
            q, k, v, causal=causal, softmax_scale=softmax_scale, mask=mask, key_lengths=key_lengths,
            dropout_p=dropout_p, return_lse=return_lse,
        )  # fmt: skip
        chosen = backends.select("attention", BACKENDS, described, backend)
        plan = described, registration.entry(chosen, forced=backends.named(backend) is not None)
        if key is not None:
            _plans.put(key, plan)
    described, run = plan
    out, lse = run(described, q, k, v, mask, key_lengths)
    return (out, cast(torch.Tensor, lse)) if return_lse else out


backends.register(attention, _problem.describe, BACKENDS)
