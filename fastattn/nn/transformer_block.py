"""One pre-norm transformer layer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn.attention import KeyValueCache, MultiheadAttention
from fastattn.nn.checks import check_probability
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.layer_norm import LayerNorm
from fastattn.nn.plain import is_plain


class TransformerBlock(torch.nn.Module):
    """A pre-norm transformer layer that carries the residual stream beside its branch.

    The layer computes what every pre-norm layer does (Xiong et al. 2020, arXiv:2002.04745):

        x = x + dropout(attention(norm1(x)))
        x = x + dropout(feed_forward(norm2(x)))

    but leaves each addition to the norm after it, which does both in one pass, with the dropout of
    the attention's branch. So it takes and returns a pair, whose sum is the x above. Over several
    layers:

        branch, residual = x, None
        for block in blocks:
            branch, residual = block(branch, residual)
        out, _ = final_norm(branch, residual)  # or branch + residual, without a norm

    Args:
        embed_dim: size of the last dimension of input and output.
        num_heads: number of attention heads; must divide embed_dim.
        feedforward_dim: size of the hidden layer of the feed-forward; default ``4 * embed_dim``.
        dropout: probability with which an element of either branch is dropped in training.
        attention_dropout: the same for the attention weights; default ``dropout``.
        activation: of the feed-forward: "gelu_tanh", "gelu" (by erf), "relu" or "silu".
        norm_eps: eps of both norms.
        bias: whether projections, linear layers and norms have one.
        causal: whether a position sees only itself and those before it.
        recompute: have the feed-forward keep only its input for backward.
        softmax_scale: factor of the attention scores; default ``1 / sqrt(embed_dim / num_heads)``.

    Raises:
        ValueError: from the constructors of the parts, naming the argument.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int | None = None,
        *,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        activation: str = "gelu_tanh",
        norm_eps: float = 1e-5,
        bias: bool = True,
        causal: bool = False,
        recompute: bool = False,
        softmax_scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_probability("dropout", dropout)
        if attention_dropout is None:
            attention_dropout = dropout
        check_probability("attention_dropout", attention_dropout)
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.norm1 = LayerNorm(embed_dim, norm_eps, bias=bias, device=device, dtype=dtype)
        self.attention = MultiheadAttention(
            embed_dim,
            num_heads,
            attention_dropout,
            bias,
            batch_first=True,
            device=device,
            dtype=dtype,
        )
        self.dropout = torch.nn.Dropout(dropout)
        self.norm2 = LayerNorm(embed_dim, norm_eps, bias=bias, device=device, dtype=dtype)
        self.feed_forward = FeedForward(
            embed_dim,
            feedforward_dim,
            activation,
            bias=bias,
            dropout=dropout,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(branch, residual) -> (branch, residual), all (batch, seqlen, embed_dim).

        ``x`` is the branch of the layer before, or the input itself where ``residual`` is None.
        ``key_lengths`` and ``cache`` go to `MultiheadAttention.self_attention`.
        """
        if residual is None:
            residual = x
            hidden = self.norm1(x)
        else:
            hidden, residual = self.norm1(x, residual)
        hidden = self.attention.self_attention(
            hidden,
            causal=self.causal,
            key_lengths=key_lengths,
            cache=cache,
            softmax_scale=self.softmax_scale,
        )
        if self.dropout.training and is_plain(self.dropout, torch.nn.Dropout):
            hidden, residual = self.norm2(hidden, residual, dropout_p=self.dropout.p)
        else:
            hidden, residual = self.norm2(self.dropout(hidden), residual)
        return self.feed_forward(hidden), residual

    def extra_repr(self) -> str:
        return f"causal={self.causal}, softmax_scale={self.softmax_scale}"
