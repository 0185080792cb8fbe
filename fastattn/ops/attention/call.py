"""A call of attention in the form in which it travels: what backends and the registered op take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

UNBOUNDED = -1  # of a side of the window


class Extras(NamedTuple):
    """The tensors of a call besides q, k and v. `None` is a feature that is not used.

    Broadcast dimensions have size 1. In a packed call (`cu_seqlens_q` is given) batch is the number
    of sequences, and seqlen_q, seqlen_k are the longest ones.
    """

    mask: torch.Tensor | None = None  # (batch|1, heads|1, seqlen_q|1, seqlen_k|1), boolean
    bias: torch.Tensor | None = None  # (batch|1, heads|1, seqlen_q|1, seqlen_k|1)
    alibi_slopes: torch.Tensor | None = None  # (batch|1, heads), float32
    sink: torch.Tensor | None = None  # (heads,)
    key_lengths: torch.Tensor | None = None  # (batch,)
    q_documents: torch.Tensor | None = None  # (batch, seqlen_q); packed: (total_q,)
    k_documents: torch.Tensor | None = None  # (batch, seqlen_k); packed: (total_k,)
    blocks: tuple[torch.Tensor, ...] | None = None  # BlockMask.tensors
    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,)
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None  # (batch,)
    seqused_k: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None  # (1,), int64


NONE = Extras()


class Learnt(NamedTuple):
    """Something of each of the extras that have a gradient, such as whether it is wanted."""

    bias: Any
    sink: Any

    @classmethod
    def of(cls, extras: Extras) -> Learnt:
        return cls(extras.bias, extras.sink)


NO_GRADIENT = Learnt(False, False)


class Settings(NamedTuple):
    """The numbers of a call; query i sees the keys i + d - left <= j <= i + d + right.

    d is seqlen_k - seqlen_q, or 0 if `top_left`.
    """

    window_left: int  # UNBOUNDED for no bound
    window_right: int  # 0 if causal
    top_left: bool
    softmax_scale: float
    softcap: float  # 0.0 for none
    dropout_p: float
    fp32_precision: str  # "ieee" or "tf32x3"
    max_seqlen_q: int  # of a packed call, else 0
    max_seqlen_k: int
    block_q: int  # tile of the block mask, else 0
    block_k: int


def results(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the operator, without values."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(shape, dtype=torch.float32)


def forward_results(
    q: torch.Tensor, v: torch.Tensor, extras: Extras, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for a kernel to fill; they are filled where none runs."""
    out, lse = results(q, v)
    if no_sequence(extras, settings.max_seqlen_q):
        out.zero_()
        lse.fill_(float("-inf"))
    return out, lse


def backward_results(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for the kernels to fill; those that none fills are zero."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if no_sequence(extras, settings.max_seqlen_q):
        dq.zero_()
    if no_sequence(extras, settings.max_seqlen_k):
        dk.zero_()
        dv.zero_()
    return dq, dk, dv


def no_sequence(extras: Extras, longest: int) -> bool:
    """Whether a packed call has no queries, or no keys, in any sequence, so that no kernel runs.

    Otherwise the kernels of a sequence's tiles write the tokens after it that no sequence has.

    Args:
        longest: max_seqlen_q or max_seqlen_k.
    """
    return extras.cu_seqlens_q is not None and (extras.cu_seqlens_q.shape[0] == 1 or longest == 0)
