"""Attention, norms and blocks as plain formulas on the parameters of our modules, in their dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn import Attention, FeedForward, LayerNorm, OffsetRMSNorm, RMSNorm, TransformerBlock

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    weight = norm.weight + (1 if isinstance(norm, OffsetRMSNorm) else 0)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def normalised(norm: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, LayerNorm):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return rms_norm(norm, x)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) by the angles of (batch or 1, seqlen, rotary_dim / 2)."""
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    a, b, rest = x.split((cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def banded(window: tuple[int, int] | None, causal: bool, queries: int, keys: int) -> Tensor:
    """(queries, keys): True where window and causality let a query see a key."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    left, right = (-1, -1) if window is None else window
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if left >= 0:
        seen &= distance >= -left
    return seen & (distance <= right) if right >= 0 else seen


def attended(
    a: Attention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    causal: bool = False,
    rotary: tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`Attention.forward` without dropout and cache."""
    rows = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.num_kv_heads * a.head_dim
    if a.cross:
        k, v = F.linear(context, a.kv_proj.weight, a.kv_proj.bias).split(rows[1:], -1)
        q = F.linear(x, a.q_proj.weight, a.q_proj.bias)
    else:
        q, k, v = F.linear(x, a.in_proj.weight, a.in_proj.bias).split(rows, -1)
    if a.qk_norm == "all":
        q, k = rms_norm(a.q_norm, q), rms_norm(a.k_norm, k)
    q, k, v = (t.unflatten(-1, (-1, a.head_dim)) for t in (q, k, v))
    if a.qk_norm == "head":
        q, k = rms_norm(a.q_norm, q), rms_norm(a.k_norm, k)
    if rotary is not None:
        q, k = turned(q, *rotary), turned(k, *rotary)
    k, v = (t.repeat_interleave(a.num_heads // a.num_kv_heads, 2) for t in (k, v))
    scale = a.head_dim**-0.5 if a.softmax_scale is None else a.softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if a.softcap:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    seen = banded(a.window, causal, q.shape[1], k.shape[1])
    if key_lengths is not None:
        seen = seen & (torch.arange(k.shape[1]) < key_lengths[:, None])[:, None, None]
    if mask is not None:
        seen = seen & mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)
    return F.linear(out, a.out_proj.weight, a.out_proj.bias)


def fed_forward(f: FeedForward, x: Tensor) -> Tensor:
    hidden, activation = F.linear(x, f.linear1.weight, f.linear1.bias), ACTIVATIONS[f.activation]
    if f.gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(F.linear(x, f.gate.weight, f.gate.bias)) * hidden
    return F.linear(hidden, f.linear2.weight, f.linear2.bias)


def block(b: TransformerBlock, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The stream after a layer, as the docstring of `TransformerBlock` writes it."""
    branches = [(b.norm1, b.norm1_out, lambda x: attended(b.attention, x, causal=b.causal))]
    if b.cross_attention is not None:
        cross = b.cross_attention
        branches.append((b.cross_norm, b.cross_norm_out, lambda x: attended(cross, x, context)))
    branches.append((b.norm2, b.norm2_out, lambda x: fed_forward(b.feed_forward, x)))
    for norm, norm_out, f in branches:
        if b.norm_placement == "pre":
            x = x + f(normalised(norm, x))
        elif b.norm_placement == "post":
            x = normalised(norm, x + f(x))
        elif b.norm_placement == "output":
            x = x + normalised(norm, f(x))
        else:
            x = x + normalised(norm_out, f(normalised(norm, x)))
    return x
