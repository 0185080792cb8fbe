"""What a call of attention is, apart from its data, and every error that a user can make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn.ops.common import modes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LENGTH_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class AttentionProblem:
    """Metadata of one call; `check()` has passed before a backend sees it."""

    q_shape: tuple[int, ...]  # (batch, seqlen_q, heads, head_dim)
    k_shape: tuple[int, ...]  # (batch, seqlen_k, kv_heads, head_dim)
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    causal: bool
    softmax_scale: float
    mask_shape: tuple[int, ...] | None
    has_key_lengths: bool
    dropout_p: float
    return_lse: bool
    needs_grad: bool
    transformed: bool

    @property
    def batch(self) -> int:
        return self.q_shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.q_shape[1]

    @property
    def heads(self) -> int:
        return self.q_shape[2]

    @property
    def head_dim(self) -> int:
        return self.q_shape[3]

    @property
    def seqlen_k(self) -> int:
        return self.k_shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k_shape[2]

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def is_empty(self) -> bool:
        return 0 in self.q_shape or 0 in self.k_shape

    def describe(self) -> str:
        features = [
            "causal" if self.causal else "",
            f"mask {tuple(self.mask_shape)}" if self.mask_shape is not None else "",
            "key_lengths" if self.has_key_lengths else "",
            f"dropout_p={self.dropout_p}" if self.dropout_p else "",
            "return_lse" if self.return_lse else "",
            "with gradients" if self.needs_grad else "",
            "under a torch.func transform or forward-mode AD" if self.transformed else "",
        ]
        shapes = f"q {tuple(self.q_shape)}, k {tuple(self.k_shape)}"
        kind = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return ", ".join([shapes, kind, *filter(None, features)])


def describe(
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
) -> AttentionProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    check(q, k, v, causal, softmax_scale, mask, key_lengths, dropout_p)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[3])
    return AttentionProblem(
        q_shape=q.shape,
        k_shape=k.shape,
        v_shape=v.shape,
        dtype=q.dtype,
        device=q.device,
        causal=causal,
        softmax_scale=float(softmax_scale),
        mask_shape=None if mask is None else mask.shape,
        has_key_lengths=key_lengths is not None,
        dropout_p=dropout_p,
        return_lse=return_lse,
        needs_grad=modes.needs_grad(q, k, v),
        transformed=modes.transformed(),
    )


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    dropout_p: float,
) -> None:
    """Raise for whatever the caller got wrong; the only place of the op that does."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, heads, head_dim); "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"{name} must have one of the dtypes {accepted}; got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must have one dtype; got q {q.dtype}, {name} {tensor.dtype}: "
                "cast them to the same"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device; got q on {q.device}, {name} on {tensor.device}"
            )
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    if k.shape[0] != batch:
        raise ValueError(f"k must have q's batch size {batch}; got shape {tuple(k.shape)}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k must have q's head_dim {head_dim}; got shape {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    if head_dim == 0:
        raise ValueError(f"head_dim must be at least 1; got q of shape {tuple(q.shape)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k and v; got {heads} and {kv_heads}"
        )
    if not isinstance(causal, bool):
        raise TypeError(
            f"causal must be True (bottom-right) or False; got {type(causal).__name__} {causal!r}"
        )
    if softmax_scale is not None:
        if not isinstance(softmax_scale, (int, float)):
            raise TypeError(f"softmax_scale must be a float; got {type(softmax_scale).__name__}")
        # Not math.isfinite: under torch.compile(dynamic=True) a module's float is symbolic.
        if not -math.inf < softmax_scale < math.inf:
            raise ValueError(f"softmax_scale must be finite; got {softmax_scale}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float; got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1); got {dropout_p}")
    if mask is not None:
        _check_mask(mask, (batch, heads, seqlen_q, seqlen_k), q.device)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, batch, q.device)


def _check_mask(mask: torch.Tensor, full: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a torch.Tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True where a key may be seen; got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"mask must be on q's device {device}; got {mask.device}")
    fits = mask.dim() == 4 and mask.shape[3] == full[3]
    if not fits or any(mask.shape[i] not in (1, full[i]) for i in range(3)):
        raise ValueError(
            "mask must have the shape (batch or 1, heads or 1, seqlen_q or 1, seqlen_k) = "
            f"{full}, 1 allowed in the first three; got {tuple(mask.shape)}"
        )


def _check_key_lengths(key_lengths: torch.Tensor, batch: int, device: torch.device) -> None:
    if not isinstance(key_lengths, torch.Tensor):
        raise TypeError(f"key_lengths must be a torch.Tensor; got {type(key_lengths).__name__}")
    if key_lengths.dtype not in LENGTH_DTYPES:
        raise TypeError(f"key_lengths must be int32 or int64; got {key_lengths.dtype}")
    if key_lengths.device != device:
        raise ValueError(f"key_lengths must be on q's device {device}; got {key_lengths.device}")
    if tuple(key_lengths.shape) != (batch,):
        raise ValueError(
            f"key_lengths must have the shape (batch,) = ({batch},); got {tuple(key_lengths.shape)}"
        )
