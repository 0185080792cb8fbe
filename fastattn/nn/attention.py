"""Attention as current models have it: the module that this package's models are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.nn.checks import check_choice, check_positive, check_probability
from fastattn.nn.linear import Linear
from fastattn.nn.rms_norm import OffsetRMSNorm, RMSNorm
from fastattn.nn.stored_cache import fix_scale
from fastattn.ops.attention import (
    attention,
    attention_varlen,
    attention_with_kv_cache,
    ring_attention,
)
from fastattn.ops.rotary import rotary as rotate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

QK_NORMS = (None, "head", "all")


class KeyValueCache(NamedTuple):
    """The cache of one layer, in the form of `fastattn.attention_with_kv_cache`.

    A layer writes new keys and values after the first ``lengths`` ones. The caller then counts
    ``lengths`` on, which several layers may share. With ``block_table`` the first dimension of keys
    and values is pages, the second the slots of a page. Keys and values of int8 or float8_e4m3fn
    have scales, in which 0 says that the sequence's next tokens fix them (`nn/stored_cache.py`).
    """

    keys: Tensor  # (batch, capacity, kv_heads, head_dim)
    values: Tensor  # (batch, capacity, kv_heads, head_dim)
    lengths: Tensor  # (batch,), int32 or int64
    block_table: Tensor | None = None  # (batch, pages of a sequence), int32 or int64
    k_scale: Tensor | None = None  # (batch, kv_heads), float32
    v_scale: Tensor | None = None


class PackedSequences(NamedTuple):
    """Sequences that lie one after another in one row, as `fastattn.attention_varlen` has them."""

    cu_seqlens: Tensor  # (sequences + 1,), int32 or int64: their starts, and the end of the last
    max_seqlen: int  # of the longest


class SequencePart(NamedTuple):
    """Which part of whole rows a process holds: its share of `fastattn.ops.attention.zigzag`."""

    group: ProcessGroup  # the processes that hold the parts
    length: int  # of a whole row, a multiple of twice the group's size


class Attention(torch.nn.Module):
    """Self-attention, or cross-attention to a context, on `fastattn.attention`.

        q, k, v = in_proj(x)                    cross: q_proj(x), kv_proj(context)
        q, k = rotary(norm(q), norm(k))         where the model has them
        out = out_proj(attention(q, k, v))

    The rows of ``in_proj.weight`` are those of q, then k, then v, each head by head; those of
    ``kv_proj.weight`` k, then v. Query head h reads key head h // (num_heads / num_kv_heads)
    (Ainslie et al. 2023, arXiv:2305.13245).

    Args:
        embed_dim: size of the last dimension of input and output.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; must divide num_heads; default num_heads.
        head_dim: size of a head; default ``embed_dim / num_heads``.
        cross: whether keys and values are made of a context.
        bias: whether the projections of q, k and v have one.
        out_bias: whether ``out_proj`` has one; default ``bias``.
        dropout: of the attention weights, in training.
        softmax_scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        window: (left, right), how many keys a query sees before and after its own position; None
            for all, and -1 for all of a side.
        softcap: cap of the scores, ``softcap * tanh(score / softcap)``; 0: none.
        qk_norm: "head": RMSNorm of each head of q and k, "all": of all heads of q, and of k, as one
            vector; None: none. Not with cross.
        norm_eps: of these norms.
        norm_offset: whether they multiply by 1 + weight (`fastattn.nn.OffsetRMSNorm`).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        cross: bool = False,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        norm_offset: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("embed_dim", embed_dim)
        check_positive("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                "num_kv_heads must divide num_heads, got "
                f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                "embed_dim must be a multiple of num_heads where head_dim is not given, got "
                f"embed_dim={embed_dim} and num_heads={num_heads}"
            )
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        check_positive("head_dim", head_dim)
        check_choice("qk_norm", qk_norm, QK_NORMS)
        if cross and qk_norm is not None:
            raise ValueError("qk_norm is of self-attention: leave it None where cross is True")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dropout = check_probability("dropout", dropout)
        self.softmax_scale = softmax_scale
        self.window = window
        self.softcap = softcap
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cross = cross
        q_rows, kv_rows = num_heads * head_dim, 2 * num_kv_heads * head_dim
        if cross:
            self.q_proj = Linear(embed_dim, q_rows, bias, **where)
            self.kv_proj = Linear(embed_dim, kv_rows, bias, **where)
        else:
            self.in_proj = Linear(embed_dim, q_rows + kv_rows, bias, **where)
        self.out_proj = Linear(q_rows, embed_dim, bias if out_bias is None else out_bias, **where)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            norm = OffsetRMSNorm if norm_offset else RMSNorm
            heads = (1, 1) if qk_norm == "head" else (num_heads, num_kv_heads)
            self.q_norm, self.k_norm = (norm(n * head_dim, norm_eps, **where) for n in heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeyValueCache | None = None,
        *,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        packed: PackedSequences | None = None,
        part: SequencePart | None = None,
    ) -> Tensor:
        """Attend from ``x`` to itself, or to ``context``; returns a tensor like ``x``.

        Args:
            x: (batch, seqlen, embed_dim).
            context: of cross-attention: (batch, seqlen_k, embed_dim), or a cache of the keys and
                values that `keys_and_values` has made of it, with the lengths of those that count,
                which is only read.
            causal, key_lengths, mask, bias: as `fastattn.attention`'s.
            rotary: cos and sin of the positions of x (`RotaryEmbedding`).
            cache: keys and values of the positions before x, to which those of x are appended. A
                bias is then of the first slots of the cache, as many as it has columns, which must
                reach all keys; not with pages. A cache, of a context too, is without a gradient, in
                eval mode if the module has dropout, and excludes key_lengths and mask.
            packed: x is one row, of these sequences, each of which attends to itself. Excludes
                cache, key_lengths, mask and bias.
            part: x is this process's part of rows whose other parts the processes of a group have
                (`ring_attention`). `packed` is then of the whole row. Excludes cache, key_lengths,
                mask and bias, and dropout.

        Raises:
            ValueError: x has another shape, or arguments are missing or exclude each other.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have the shape (batch, seqlen, {self.embed_dim}), got {tuple(x.shape)}"
            )
        cached = cache is not None or isinstance(context, KeyValueCache)
        if cached and (key_lengths is not None or mask is not None):
            raise ValueError("key_lengths and mask must be None with a cache")
        others = cache, key_lengths, mask, bias
        for name, given in (("packed sequences are", packed), ("a part of a sequence is", part)):
            if given is not None and (self.cross or any(other is not None for other in others)):
                raise ValueError(
                    f"{name} for self-attention, with cache, key_lengths, mask and bias None"
                )
        if self.cross:
            if context is None or rotary is not None or cache is not None:
                raise ValueError("cross-attention takes a context, and neither rotary nor cache")
            q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
            if isinstance(context, KeyValueCache):
                heads = self._cached(q, None, None, context, causal, bias)
                return self.out_proj(heads.flatten(-2))
            k, v = self.keys_and_values(context)
        else:
            if context is not None:
                raise ValueError(
                    "a context is of cross-attention: build the module with cross=True"
                )
            q, k, v = self._split(self.in_proj(x))
            q, k = self._placed(q, k, rotary)
        if cache is not None:
            heads = self._cached(q, k, v, cache, causal, bias)
        elif part is not None:
            heads = self._of_part(q, k, v, part, packed, causal)
        elif packed is not None:
            heads = self._packed(q, k, v, packed, causal)
        else:
            p = self.dropout if self.training else 0.0
            scores = self._scores(causal)
            heads = attention(
                q, k, v, key_lengths=key_lengths, mask=mask, bias=bias, dropout_p=p, **scores
            )
        return self.out_proj(heads.flatten(-2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seqlen, embed_dim) -> k and v, (batch, seqlen, num_kv_heads, head_dim) each."""
        packed = self.kv_proj(context)
        k, v = packed.unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(-3)
        return k, v

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of (batch, seqlen, heads or kv_heads, head_dim)."""
        heads = packed.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), -2)
        return q, k, v

    def _placed(
        self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """q and k after their norms and the rotation; one op for both where a norm is a head's."""
        q_norm, k_norm = self.q_norm, self.k_norm
        weights: dict[str, Any] = {}
        if q_norm is not None and k_norm is not None:
            if self.qk_norm == "all":
                q, k = q_norm(q.flatten(-2)).view_as(q), k_norm(k.flatten(-2)).view_as(k)
            elif rotary is None:
                q, k = q_norm(q), k_norm(k)
            else:
                offset = 1.0 if isinstance(q_norm, OffsetRMSNorm) else 0.0
                weights = {
                    "q_weight": q_norm.weight,
                    "k_weight": k_norm.weight,
                    "eps": self.norm_eps,
                    "weight_offset": offset,
                }
        if rotary is None:
            return q, k
        # cos has an angle for each pair: where it is narrow, the op could not tell
        return rotate(q, k, *rotary, rotary_dim=2 * rotary[0].shape[-1], **weights)

    def _scores(self, causal: bool) -> dict[str, Any]:
        """What the module itself says of the scores."""
        return {
            "causal": causal,
            "window": self.window,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, causal: bool
    ) -> Tensor:
        if q.shape[0] != 1:
            raise ValueError(f"packed sequences lie in one row, and x has {q.shape[0]}")
        starts, longest = packed
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        p, scores = self.dropout if self.training else 0.0, self._scores(causal)
        heads: Tensor = attention_varlen(
            q, k, v, starts, starts, longest, longest, **scores, dropout_p=p
        )
        return heads.unsqueeze(0)

    def _of_part(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: SequencePart,
        packed: PackedSequences | None,
        causal: bool,
    ) -> Tensor:
        if self.training and self.dropout:
            raise ValueError(
                f"attention weights have dropout={self.dropout}, which parts of a sequence on "
                "several processes do not support: set it to 0 (attn_pdrop of a GPTConfig)"
            )
        starts = None if packed is None else packed.cu_seqlens
        return ring_attention(q, k, v, part.group, **self._scores(causal), cu_seqlens=starts)

    def _cached(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: KeyValueCache,
        causal: bool,
        bias: Tensor | None,
    ) -> Tensor:
        if self.training and self.dropout:
            raise ValueError(
                f"a cache is for inference, and this module has dropout={self.dropout} in training "
                "mode: call eval() first"
            )
        plain = cache.block_table is cache.k_scale is None
        if bias is not None:
            if k is None or v is None or not plain or self.window is not None:
                raise ValueError(
                    "a bias with a cache takes no pages, window or context, and no 8-bit numbers"
                )
            return self._cached_with_bias(q, k, v, cache, causal, bias)
        for scale, x in ((cache.k_scale, k), (cache.v_scale, v)):
            if scale is not None and x is not None:
                fix_scale(scale, x, cache.keys.dtype)
        return attention_with_kv_cache(
            q,
            cache.keys,
            cache.values,
            cache.lengths,
            k=k,
            v=v,
            block_table=cache.block_table,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            **self._scores(causal),
        )

    def _cached_with_bias(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache, causal: bool, bias: Tensor
    ) -> Tensor:
        """The same as plain operations, for the op on a cache has no bias."""
        batch, seqlen = q.shape[:2]
        places = cache.lengths.unsqueeze(1) + torch.arange(seqlen, device=q.device)
        rows = torch.arange(batch, device=q.device).unsqueeze(1)
        cache.keys[rows, places] = k.to(cache.keys.dtype)  # another under autocast
        cache.values[rows, places] = v.to(cache.values.dtype)
        slots = bias.shape[-1]
        mask = None
        if causal and seqlen > 1:  # a single query sees all keys that there are
            mask = torch.arange(slots, device=q.device) <= places[:, None, :, None]
        return attention(
            q,
            cache.keys[:, :slots],
            cache.values[:, :slots],
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            key_lengths=cache.lengths + seqlen,
            mask=mask,
            bias=bias,
        )

    def extra_repr(self) -> str:
        parts = [f"num_heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        for name in ("window", "qk_norm", "softmax_scale"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.softcap:
            parts.append(f"softcap={self.softcap}")
        return ", ".join(parts)
