"""A call of attention in the form in which it travels: what backends and the registered op take.

An option is listed here once: as the caller gives it in `Features`, as it is computed with in
`Extras` or `Settings`. What only passes a call on names none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import torch

from fastattn.ops.attention import sink

if TYPE_CHECKING:
    from fastattn.ops.attention.block_mask import BlockMask

UNBOUNDED = -1  # of a side of the window

Causal = bool | Literal["bottom_right", "top_left"]
Documents = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Static = Annotated[int, "torch.compile compiles a graph for each"]


class Features(NamedTuple):
    """The options of a call as the caller gave them; `attention` explains each."""

    causal: Causal = False
    window: tuple[int, int] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    fp32_precision: str = "ieee"
    deterministic: bool = True
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    document_ids: Documents | None = None
    block_mask: BlockMask | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[7:]


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
    dropout_p: float = 0.0
    fp32_precision: str = "ieee"  # or "tf32x3"
    max_seqlen_q: int = 0  # of a packed call
    max_seqlen_k: int = 0
    block_q: Static = 0  # tile of the block mask, else 0
    block_k: Static = 0
    deterministic: bool = True  # whether dq is added to in one order


_IN_SCHEMA = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    tuple[torch.Tensor, ...] | None: "Tensor[]?",
    int: "SymInt",
    int | None: "SymInt?",
    Static: "int",
    bool: "bool",
    float: "float",
    str: "str",
}


def schema(fields: type[tuple[Any, ...]], names: Iterable[str] = ()) -> str:
    """The fields of a NamedTuple, or those of these names, as arguments of a registered op."""
    kinds = get_type_hints(fields, include_extras=True)
    return ", ".join(f"{_IN_SCHEMA[kinds[name]]} {name}" for name in names or kinds)


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


def learnt_results(
    q: torch.Tensor, wanted: Learnt, extras: Extras, lse: Any, delta: Any, dbias: Any = None
) -> tuple[torch.Tensor, ...]:
    """The gradients of `Learnt`, empty where none is wanted; lse, delta: as of `sink.gradient`."""
    given = extras.sink if wanted.sink else None
    dsink = None if given is None else sink.gradient(lse, delta, given)
    # Each empty one is another: outputs may not alias.
    return tuple(q.new_empty((0,)) if x is None else x for x in Learnt(dbias, dsink))


def no_sequence(extras: Extras, longest: int) -> bool:
    """Whether a packed call has no queries, or no keys, in any sequence, so that no kernel runs.

    Otherwise the kernels of a sequence's tiles write the tokens after it that no sequence has.

    Args:
        longest: max_seqlen_q or max_seqlen_k.
    """
    return extras.cu_seqlens_q is not None and (extras.cu_seqlens_q.shape[0] == 1 or longest == 0)
