"""A GPT in plain PyTorch, as nanoGPT and gpt-fast write it.

Shapes: B batch, T tokens, C width, H heads, D head_dim, S slots of a cache, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY_MULTIPLE = 64  # what nanoGPT pads the vocabulary to: 50257 -> 50304
CACHE_MULTIPLE = 8  # what gpt-fast pads its cache to


class PlainGPT(nn.Module):
    """GPT-2 by F.scaled_dot_product_attention; the vocabulary is padded, the head tied.

    The padding's weights are 0. Caches are buffers of a fixed size, so that the one-token step
    works on the same memory every time.
    """

    def __init__(self, theirs: Any, dropout: float) -> None:
        super().__init__()
        config, source = theirs.config, theirs.transformer
        where = {"device": theirs.device}
        self.vocab_size = config.vocab_size
        padded = -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.wte = nn.Embedding(padded, config.n_embd, **where)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, **where)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PlainBlock(block, dropout) for block in source.h)
        self.norm = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **where)
        self.head = nn.Linear(config.n_embd, padded, bias=False, **where)
        self.head.weight = self.wte.weight
        with torch.no_grad():
            self.wte.weight.zero_()[: self.vocab_size] = source.wte.weight
            self.wpe.weight.copy_(source.wpe.weight)
        self.norm.load_state_dict(source.ln_f.state_dict())

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> logits (B, T, V padded) and the loss."""
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def make_room(self, batch: int, capacity: int) -> None:
        slots = -(-capacity // CACHE_MULTIPLE) * CACHE_MULTIPLE
        for block in self.blocks:
            block.make_room(batch, slots)
        device = self.wte.weight.device
        causal = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
        self.register_buffer("causal", causal, persistent=False)  # (S, S)
        self.register_buffer("real", causal[-1:].repeat(batch, 1), persistent=False)  # (B, S)
        padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.register_buffer("padding", padding, persistent=False)

    def begin(self, mask: Tensor) -> None:
        """Say which of the first slots are padding: (B, T), 0 where one is."""
        self.real[:, : mask.shape[1]] = mask.bool()
        self.padding.copy_((mask == 0).sum(1, keepdim=True))

    def next(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Put (B, T) tokens into the slots (T,); the most probable next one of each row, (B, 1)."""
        seen = self.causal[slots] & self.real[:, None, None]  # (B, 1, T, S)
        # Padding sees itself: a row that sees nothing would be NaN, and spoil what it is read by.
        seen = seen | (slots[:, None] == torch.arange(seen.shape[-1], device=slots.device))
        x = self.wte(ids) + self.wpe((slots - self.padding).clamp(min=0))
        for block in self.blocks:
            x = block(x, slots, seen)
        logits = self.head(self.norm(x[:, -1:]))[..., : self.vocab_size]
        return logits[:, -1].argmax(-1, keepdim=True)


class PlainBlock(nn.Module):
    def __init__(self, theirs: Any, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = theirs.attn.num_heads, dropout
        self.norm1, self.norm2 = (_norm(norm) for norm in (theirs.ln_1, theirs.ln_2))
        self.qkv, self.proj = _linear(theirs.attn.c_attn), _linear(theirs.attn.c_proj)
        self.up, self.down = _linear(theirs.mlp.c_fc), _linear(theirs.mlp.c_proj)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, slots: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.proj(self.attend(self.qkv(self.norm1(x)), slots, seen)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))

    def attend(self, qkv: Tensor, slots: Tensor | None, seen: Tensor | None) -> Tensor:
        """(B, T, 3 C) -> (B, T, C)"""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        if slots is None:
            dropped = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)
        else:
            self.keys[:, :, slots] = k
            self.values[:, :, slots] = v
            out = F.scaled_dot_product_attention(q, self.keys, self.values, seen)
        return out.transpose(1, 2).flatten(2)

    def make_room(self, batch: int, slots: int) -> None:
        weight = self.proj.weight
        shape = (batch, self.heads, slots, weight.shape[0] // self.heads)  # (B, H, S, D)
        for name in ("keys", "values"):
            self.register_buffer(name, weight.new_zeros(shape), persistent=False)


def _norm(theirs: nn.LayerNorm) -> nn.LayerNorm:
    norm = nn.LayerNorm(theirs.normalized_shape, theirs.eps, device=theirs.weight.device)
    norm.load_state_dict(theirs.state_dict())
    return norm


def _linear(theirs: Any) -> nn.Linear:
    """transformers' Conv1D, which keeps its weight transposed."""
    rows, columns = theirs.weight.shape
    linear = nn.Linear(rows, columns, device=theirs.weight.device)
    with torch.no_grad():
        linear.weight.copy_(theirs.weight.t())
        linear.bias.copy_(theirs.bias)
    return linear
