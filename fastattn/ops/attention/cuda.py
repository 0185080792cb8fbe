"""The `cuda` backend of attention: csrc/attention/forward.cuh and backward.cuh.

float16 and bfloat16, head_dim up to 256; all that a call can have but documents and block masks,
and a gradient of everything but the bias, which is Triton's.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import (
    Extras,
    Learnt,
    Settings,
    backward_results,
    forward_results,
    learnt_results,
    no_sequence,
)
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import dropout

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MISSING = {"q_documents": "documents", "k_documents": "documents", "blocks": "block masks"}
_FEATURES = [name for name in Extras._fields if name not in MISSING]
MAX_SEQLEN = 2**30 - 1  # positions are 32-bit, and so is a position and a side of the window


def beyond_limits(problem: AttentionProblem) -> str | None:
    """The reason why no kernel of attention in csrc/ can run `problem`, or None."""
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype not in DTYPES:
        return f"the CUDA kernels compute in float16 and bfloat16, not in {problem.dtype}"
    widest = max(problem.head_dim, problem.head_dim_v)
    return f"head_dim {widest} is above {MAX_HEAD_DIM}" if widest > MAX_HEAD_DIM else None


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    if (reason := beyond_limits(problem)) is not None:
        return reason
    for name, called in MISSING.items():
        if name in problem.given:
            return f"the CUDA kernels have no {called}"
    if problem.needs_bias_grad:
        return "the CUDA kernels have no gradient for bias"
    if problem.needs_slope_grad:
        return "the kernels have no gradient for alibi_slopes"
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_SEQLEN:
        return f"a sequence of {max(problem.seqlen_q, problem.seqlen_k)} tokens is above 2^30 - 1"
    return None


declined = tiles.few_queries


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a registered call; lse float32."""
    out, lse = forward_results(q, v, extras, settings)
    if no_sequence(extras, settings.max_seqlen_q):
        return out, lse
    torch.ops.fastattn_cuda.attention_forward(
        _padded(out), lse, *(_padded(readable(x)) for x in (q, k, v)), *_features(extras),
        *_numbers(q, k, settings),
    )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Learnt,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, *learnt_results), each shaped as its input and contiguous."""
    assert not wanted.bias, "unsupported() refuses it"
    dq, dk, dv = backward_results(q, k, v, extras, settings)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    mask, bias, slopes, _, *lengths = _features(extras)
    torch.ops.fastattn_cuda.attention_backward(
        *(_padded(x) for x in (dq, dk, dv)), delta, _padded(readable(dout)),
        None if dlse is None else dlse.contiguous(), _padded(readable(out)), lse,
        *(_padded(readable(x)) for x in (q, k, v)), mask, bias, slopes, *lengths,
        *_numbers(q, k, settings),
    )  # fmt: skip
    return dq, dk, dv, *learnt_results(q, wanted, extras, lse, delta)


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where the kernels can read it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """A packed tensor with a batch of 1."""
    return x if x.dim() == 4 else x[None]


def _features(extras: Extras) -> tuple[Any, ...]:
    """The tensors of a call in the order of the ops' arguments; vectors contiguous."""
    mask, bias, *vectors = (getattr(extras, name) for name in _FEATURES)
    return mask, bias, *(None if x is None else x.contiguous() for x in vectors)


def _numbers(q: torch.Tensor, k: torch.Tensor, settings: Settings) -> tuple[Any, ...]:
    """The numbers of a call in the order of the ops' arguments."""
    packed = q.dim() == 3  # no sequence is longer than all together, whatever the caller says
    return (
        settings.window_left, settings.window_right, settings.top_left, settings.softmax_scale,
        settings.softcap, settings.dropout_p, dropout.threshold(settings.dropout_p),
        min(settings.max_seqlen_q, q.shape[0]) if packed else q.shape[1],
        min(settings.max_seqlen_k, k.shape[0]) if packed else k.shape[1],
    )  # fmt: skip
