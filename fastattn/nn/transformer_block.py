"""One transformer layer as a module: of an encoder, a decoder, or the decoder of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn.attention import Attention, KeyValueCache, PackedSequences, SequencePart
from fastattn.nn.checks import check_choice, check_probability
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.layer_norm import LayerNorm
from fastattn.nn.plain import is_plain
from fastattn.nn.rms_norm import OffsetRMSNorm, RMSNorm

NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "offset_rms_norm": OffsetRMSNorm,
}
PLACEMENTS = ("pre", "post", "output", "both")


class TransformerBlock(torch.nn.Module):
    """A transformer layer that carries the residual stream beside its branch.

    With f an attention or the feed-forward, the layer computes, by ``norm_placement``:

        "pre"       x = x + f(norm(x))              GPT-2 (Xiong et al. 2020, arXiv:2002.04745)
        "post"      x = norm(x + f(x))              BERT (Vaswani et al. 2017, arXiv:1706.03762)
        "output"    x = x + norm(f(x))              OLMo 2
        "both"      x = x + norm_out(f(norm(x)))    Gemma 2

    but leaves each addition to the norm after it where there is one, which does both in one pass,
    with the dropout of the branch. So it takes and returns a pair, whose sum is the x above. Over
    several layers:

        branch, residual = x, None
        for block in blocks:
            branch, residual = block(branch, residual)
        out, _ = final_norm(branch, residual)  # or branch + residual, without a norm

    After "post" the residual is None, and the branch is x itself.

    Args:
        embed_dim: size of the last dimension of input and output.
        num_heads, num_kv_heads, head_dim, softmax_scale, window, softcap, qk_norm: `Attention`'s.
        feedforward_dim: size of the hidden layer of the feed-forward; default ``4 * embed_dim``.
        dropout: probability with which an element of a branch is dropped in training.
        attention_dropout: the same for the attention weights; default ``dropout``.
        activation_dropout: the same for the hidden layer of the feed-forward.
        activation, gated: of the feed-forward (`FeedForward`).
        norm: "layer_norm", "rms_norm", or "offset_rms_norm", which multiplies by 1 + weight.
        norm_eps: eps of all norms.
        norm_placement: see above.
        bias: whether projections, linear layers and LayerNorms have one.
        qkv_bias, out_bias, feedforward_bias, norm_bias: the same for one kind; default ``bias``.
        causal: whether a position sees only itself and those before it.
        cross_attention: whether there is a second attention, to a context, after the first.
        recompute: have the feed-forward keep only its input for backward.

    Raises:
        TypeError, ValueError: an argument does not fit, here or in the constructors of the parts;
            the message names it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        activation_dropout: float = 0.0,
        activation: str = "gelu_tanh",
        gated: bool = False,
        norm: str = "layer_norm",
        norm_eps: float = 1e-5,
        norm_placement: str = "pre",
        bias: bool = True,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
        feedforward_bias: bool | None = None,
        norm_bias: bool | None = None,
        causal: bool = False,
        cross_attention: bool = False,
        recompute: bool = False,
        softmax_scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        qk_norm: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_probability("dropout", dropout)
        if attention_dropout is None:
            attention_dropout = dropout
        check_probability("attention_dropout", attention_dropout)
        check_choice("norm", norm, NORMS)
        check_choice("norm_placement", norm_placement, PLACEMENTS)
        self.causal = causal
        self.norm_placement = norm_placement
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        def make_norm() -> LayerNorm | RMSNorm:
            if norm == "layer_norm":
                has_bias = bias if norm_bias is None else norm_bias
                return LayerNorm(embed_dim, norm_eps, bias=has_bias, **where)
            return NORMS[norm](embed_dim, norm_eps, **where)

        def make_attention(cross: bool) -> Attention:
            return Attention(
                embed_dim,
                num_heads,
                num_kv_heads,
                head_dim,
                cross=cross,
                bias=bias if qkv_bias is None else qkv_bias,
                out_bias=bias if out_bias is None else out_bias,
                dropout=attention_dropout,
                softmax_scale=softmax_scale,
                window=None if cross else window,
                softcap=softcap,
                qk_norm=None if cross else qk_norm,
                norm_eps=norm_eps,
                norm_offset=norm == "offset_rms_norm",
                **where,
            )

        both = norm_placement == "both"
        self.norm1 = make_norm()
        self.attention = make_attention(cross=False)
        self.norm1_out = make_norm() if both else None
        self.cross_norm = make_norm() if cross_attention else None
        self.cross_attention = make_attention(cross=True) if cross_attention else None
        self.cross_norm_out = make_norm() if both and cross_attention else None
        self.dropout = torch.nn.Dropout(dropout)
        self.norm2 = make_norm()
        self.feed_forward = FeedForward(
            embed_dim,
            feedforward_dim,
            activation,
            bias=bias if feedforward_bias is None else feedforward_bias,
            dropout=dropout,
            activation_dropout=activation_dropout,
            gated=gated,
            recompute=recompute,
            **where,
        )
        self.norm2_out = make_norm() if both else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        packed: PackedSequences | None = None,
        part: SequencePart | None = None,
        context: Tensor | KeyValueCache | None = None,
        context_lengths: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(branch, residual) -> (branch, residual), all (batch, seqlen, embed_dim).

        ``x`` is the branch of the layer before, or the input itself where ``residual`` is None.
        ``rotary``, ``key_lengths``, ``mask``, ``bias``, ``cache``, ``packed`` and ``part`` go to
        the self-attention, ``context`` to the cross-attention, whose keys ``context_lengths`` and
        ``context_mask`` hide (`Attention.forward`).
        """
        hidden, residual = self._read(self.norm1, x, residual)
        branch = self.attention(
            hidden,
            causal=self.causal,
            rotary=rotary,
            key_lengths=key_lengths,
            mask=mask,
            bias=bias,
            cache=cache,
            packed=packed,
            part=part,
        )
        x, rest = self._written(self.norm1, self.norm1_out, branch, residual)
        if self.cross_attention is not None and self.cross_norm is not None:
            hidden, residual = self._read(self.cross_norm, x, rest, self.dropout)
            branch = self.cross_attention(
                hidden, context, key_lengths=context_lengths, mask=context_mask
            )
            x, rest = self._written(self.cross_norm, self.cross_norm_out, branch, residual)
        hidden, residual = self._read(self.norm2, x, rest, self.dropout)
        branch = self.feed_forward(hidden)  # with its dropout
        return self._written(self.norm2, self.norm2_out, branch, residual, dropped=True)

    def _read(
        self,
        norm: LayerNorm | RMSNorm,
        x: Tensor,
        residual: Tensor | None,
        dropout: torch.nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What attention or feed-forward reads, and the stream: dropout(x) + residual."""
        normed = self.norm_placement in ("pre", "both")
        if residual is None:
            return (norm(x) if normed else x), x
        if normed:
            return _added(norm, x, residual, dropout)
        stream = (x if dropout is None else dropout(x)) + residual
        return stream, stream

    def _written(
        self,
        norm: LayerNorm | RMSNorm,
        norm_out: LayerNorm | RMSNorm | None,
        branch: Tensor,
        residual: Tensor,
        dropped: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The branch and the stream that it is still to be added to."""
        if self.norm_placement == "post":
            x, _ = _added(norm, branch, residual, None if dropped else self.dropout)
            return x, None
        if self.norm_placement == "output":
            return norm(branch), residual
        return (branch if norm_out is None else norm_out(branch)), residual

    def extra_repr(self) -> str:
        return f"causal={self.causal}, norm_placement={self.norm_placement!r}"


def _added(
    norm: LayerNorm | RMSNorm, x: Tensor, residual: Tensor, dropout: torch.nn.Module | None
) -> tuple[Tensor, Tensor]:
    """norm(s) and s = dropout(x) + residual, in one pass where dropout is torch's own."""
    if dropout is None:
        return norm(x, residual)
    if dropout.training and is_plain(dropout, torch.nn.Dropout):
        return norm(x, residual, dropout_p=dropout.p)
    return norm(dropout(x), residual)
