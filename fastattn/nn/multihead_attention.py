"""torch's multi-head attention as a drop-in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.nn.attention import KeyValueCache
from fastattn.nn.checks import check_integer, check_probability
from fastattn.nn.plain import is_plain, refresh
from fastattn.ops.attention import attention, attention_with_kv_cache
from fastattn.ops.common import modes
from fastattn.ops.linear import product


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `fastattn.attention`.

    Constructor arguments, initial values, ``state_dict``, `forward` and ``repr`` are torch's.
    Nothing is kept on the instance that torch does not keep, so
    ``module.__class__ = fastattn.nn.MultiheadAttention`` turns an existing layer into this one,
    and the reverse turns it back.

    `forward` computes on `fastattn.attention` whatever that op can express, additive masks
    included; for the rest it is torch's own implementation. `why_torch` says which, for the same
    arguments:

    - ``need_weights=True`` (torch's default!): a fused kernel never holds the weights.
    - ``add_bias_kv``, ``add_zero_attn`` and nested tensors.

    A query whose keys are all masked, by True or by -infinity, attends to nothing: it gives
    ``out_proj.bias``, with zero gradients. (torch gives that or NaN, by version and kernel, and
    NaN with ``need_weights=True``.)

    `self_attention` is a shorter way on torch's parameters: one tensor in, one out, unequal lengths
    as lengths, and a key-value cache. New models are made of `Attention`.

    Raises ValueError if ``num_heads`` does not divide ``embed_dim`` or ``dropout`` is not in
    [0, 1), TypeError if they are no numbers.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("embed_dim", embed_dim)
        check_integer("num_heads", num_heads)
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                "embed_dim must be a positive multiple of num_heads, got "
                f"embed_dim={embed_dim} and num_heads={num_heads}"
            )
        check_probability("dropout", dropout)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``, as `torch.nn.MultiheadAttention` does.

        Shapes, with L queries, S keys, N the batch: ``query`` (L, N, embed_dim), ``key``
        (S, N, kdim), ``value`` (S, N, vdim); N first if ``batch_first``; without N if unbatched.
        ``key_padding_mask`` (N, S) and ``attn_mask`` (L, S) or (N * num_heads, L, S): where
        boolean, **True hides the key**, the opposite of `fastattn.attention`'s ``mask``; where
        floating-point (float32 or query's dtype), they are added to the scores, with a gradient.
        ``is_causal`` is torch's hint that ``attn_mask``, which must be given, is the causal mask
        (query i sees the keys j <= i), and may be used in its place.

        Returns the output, shaped like ``query``, and the attention weights if ``need_weights``
        (averaged over the heads if ``average_attn_weights``), else None.
        """
        rest = need_weights, attn_mask, average_attn_weights, is_causal
        if self.why_torch(query, key, value, key_padding_mask, *rest) is not None:
            return super().forward(query, key, value, key_padding_mask, *rest)
        self._check_forward(query, key, value, key_padding_mask, attn_mask, is_causal)

        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

        causal = is_causal and key_padding_mask is None  # torch, too, then ignores attn_mask
        visible, bias = (None, None) if causal else self._masks(key_padding_mask, attn_mask)
        heads = attention(
            q,
            k,
            v,
            causal="top_left" if causal else False,
            bias=bias,
            mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
        )
        # By its weights, as in torch: hooks on out_proj fire only in self_attention.
        refresh(self.out_proj)
        out = F.linear(heads.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def why_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> str | None:
        """Why `forward` leaves a call with these arguments to torch's own code; None if it doesn't.

        Decided only by metadata: no value of a tensor is read.
        """
        if need_weights:
            return "need_weights=True asks for the weights, which a fused kernel never holds"
        if self.bias_k is not None or self.add_zero_attn:
            return "add_bias_kv and add_zero_attn append a key that no mask covers"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        return None

    def self_attention(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        key_lengths: Tensor | None = None,
        cache: KeyValueCache | None = None,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Attend from ``x`` (batch, seqlen, embed_dim) to itself; returns a tensor like ``x``.

        One projection gives queries, keys and values, which the kernel reads where they lie.
        ``batch_first`` has no say here: the batch is always first. ``causal``, ``key_lengths``
        (batch,) and ``softmax_scale`` mean what they do in `fastattn.attention`.

        With ``cache``, the new keys and values are written into it, and x attends to all that it
        then holds, by `fastattn.attention_with_kv_cache`: without a gradient, under
        ``torch.no_grad()``, and in eval mode if the module has dropout.

        It is a method of its own: hooks on this module belong to ``forward`` and do not fire (but
        for those of pruning and normed weights, which compute weights); those on ``out_proj`` do.
        To shard only the module by FSDP2 (not as part of a block), see
        `torch.distributed.fsdp.register_fsdp_forward_method`.

        Raises ValueError if x has another shape, if the module was built with ``kdim``, ``vdim``,
        ``add_bias_kv`` or ``add_zero_attn``, or if ``cache`` comes with ``key_lengths``, with
        dropout or where a gradient is wanted.
        """
        self._check_self_attention(x)
        refresh(self)
        q, k, v = self._project(x, x, x)
        if cache is not None:
            if key_lengths is not None:
                raise ValueError("key_lengths must be None with a cache, which has its own lengths")
            if self.training and self.dropout:
                raise ValueError(
                    f"a cache is for inference, and this module has dropout={self.dropout} in "
                    "training mode: call eval() first"
                )
            heads = attention_with_kv_cache(
                q,
                cache.keys,
                cache.values,
                cache.lengths,
                block_table=cache.block_table,
                k=k,
                v=v,
                causal=causal,
                softmax_scale=softmax_scale,
            )
        else:
            heads = attention(
                q,
                k,
                v,
                causal=causal,
                softmax_scale=softmax_scale,
                key_lengths=key_lengths,
                dropout_p=self.dropout if self.training else 0.0,
            )
        out = heads.flatten(-2)
        if is_plain(self.out_proj, NonDynamicallyQuantizableLinear):
            return product(out, self.out_proj.weight, self.out_proj.bias)
        return self.out_proj(out)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (..., features) -> (..., num_heads, head_dim) each.

        Inputs that are one tensor go through one product, of which the results are views.
        """
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            size, weight = self.embed_dim, self.in_proj_weight
            if query is key:
                q, k, v = self._split(product(query, weight, bias), 3)
                return q, k, v
            bias_q, bias_kv = (None, None) if bias is None else (bias[:size], bias[size:])
            (q,) = self._split(F.linear(query, weight[:size], bias_q), 1)
            k, v = self._split(F.linear(key, weight[size:], bias_kv), 2)
            return q, k, v

        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        (q,) = self._split(F.linear(query, weights[0], biases[0]), 1)
        (k,) = self._split(F.linear(key, weights[1], biases[1]), 1)
        (v,) = self._split(F.linear(value, weights[2], biases[2]), 1)
        return q, k, v

    def _split(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., parts * embed_dim) -> ``parts`` views of (..., num_heads, head_dim)."""
        shape = (*packed.shape[:-1], parts, self.num_heads, self.head_dim)
        return packed.view(shape).unbind(-3)

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's two masks as the op's ``mask`` (True may be seen) and ``bias``, 4-D, unexpanded.

        A mask that hides goes to the former, a mask that is added to the latter.
        """
        visible = bias = None
        if attn_mask is not None:
            batch_and_heads = (
                (attn_mask.shape[0] // self.num_heads, self.num_heads)
                if attn_mask.dim() == 3
                else (1, 1)
            )
            attn_mask = attn_mask.view(*batch_and_heads, *attn_mask.shape[-2:])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        for given in (attn_mask, key_padding_mask):
            if given is None:
                continue
            if given.dtype == torch.bool:
                visible = ~given if visible is None else visible & ~given
            else:
                if (dtype := modes.autocast_dtype(given.device.type)) is not None:
                    given = modes.cast(given, dtype)  # as torch's attention under autocast
                bias = given if bias is None else bias + given
        return visible, bias

    def _check_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        layout = "batch, seqlen" if self.batch_first else "seqlen, batch"
        for name, tensor, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.dim() not in (2, 3) or tensor.shape[-1] != features:
                raise ValueError(
                    f"{name} must have the shape ({layout}, {features}), or (seqlen, {features}) "
                    f"unbatched, got {tuple(tensor.shape)}"
                )
        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        if query.dim() == 2:
            batch, length_dim, matching = 1, 0, key.dim() == 2
        else:
            batch = query.shape[batch_dim]
            matching = key.dim() == 3 and key.shape[batch_dim] == batch
        if not matching or key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "query, key and value must have one batch size, and key and value one length, got "
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} "
                f"with batch_first={self.batch_first}"
            )

        lengths = (query.shape[length_dim], key.shape[length_dim])
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask, which is None: give the mask "
                "(torch.nn.Transformer.generate_square_subsequent_mask), or call "
                "self_attention(x, causal=True), which needs none"
            )
        if attn_mask is not None and attn_mask.shape not in (
            lengths,
            (batch * self.num_heads, *lengths),
        ):
            raise ValueError(
                f"attn_mask must have the shape {lengths} or {(batch * self.num_heads, *lengths)}, "
                f"got {tuple(attn_mask.shape)}"
            )
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is None or mask.dtype in (torch.bool, torch.float32, query.dtype):
                continue
            if not (mask.is_floating_point() and modes.autocast_enabled(query.device.type)):
                raise TypeError(
                    f"{name} must be boolean (True hides a key), or added to the scores and then "
                    f"float32 or of query's dtype {query.dtype}; got {mask.dtype}"
                )
        padding_shape = (lengths[1],) if query.dim() == 2 else (batch, lengths[1])
        if key_padding_mask is not None and key_padding_mask.shape != padding_shape:
            raise ValueError(
                f"key_padding_mask must have the shape {padding_shape}, "
                f"got {tuple(key_padding_mask.shape)}"
            )

    def _check_self_attention(self, x: Tensor) -> None:
        if not self._qkv_same_embed_dim or self.bias_k is not None or self.add_zero_attn:
            raise ValueError(
                "self_attention needs a module without kdim, vdim, add_bias_kv and add_zero_attn; "
                "call forward, or build the module without them"
            )
        if x.is_nested:
            raise TypeError(
                "x is a nested tensor, which self_attention does not take: pad it with "
                "torch.nested.to_padded_tensor(x, 0.0), and give key_lengths"
            )
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have the shape (batch, seqlen, {self.embed_dim}), got {tuple(x.shape)}"
            )
