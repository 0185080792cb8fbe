"""Attention on one device: fastattn against eager PyTorch and every backend of SDPA."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import peers
import torch
from harness import Cell
from torch import Tensor

TOKENS, WIDTH = 16384, 2048  # batch * seqlen and heads * head_dim, as FlashAttention's papers have


@dataclass(frozen=True, kw_only=True)
class AttentionCell(Cell):
    """Self-attention of (batch, seqlen, heads, head_dim)."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def axes(self) -> dict[str, object]:
        names = ("batch", "seqlen", "heads", "head_dim", "causal")
        return {name: getattr(self, name) for name in names}

    @property
    def flops(self) -> float:
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return forward * (0.5 if self.causal else 1.0) * (2.5 if self.backward else 1.0)

    def inputs(self) -> tuple[Tensor, ...]:
        shape = (self.batch, self.seqlen, self.heads, self.head_dim)
        options = {"device": self.device, "dtype": self.torch_dtype}
        return tuple(torch.randn(shape, **options) for _ in range(3))

    def definition(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peers.attention_formula(q, k, v, self.causal)

    def part(self, tensor: Tensor) -> Tensor:
        """One head of one sequence: in float64 the score matrix of all would not fit."""
        return tensor[:1, :, :1]


def cells(device: str) -> Iterator[AttentionCell]:
    """What `gpu_check` measures, the most telling first."""
    if device == "cpu":
        for causal, backward in itertools.product((False, True), (False, True)):
            yield cell(device, 66, 32, 33, 16, causal, backward, "float32")
        return
    for seqlen, head_dim in itertools.product((4096, 16384, 512, 2048), (128, 64, 256)):
        for causal, backward in itertools.product((True, False), (False, True)):
            yield cell(device, TOKENS, WIDTH, seqlen, head_dim, causal, backward, "bfloat16")
    for dtype, backward in itertools.product(("float16", "float32"), (False, True)):
        yield cell(device, TOKENS, WIDTH, 2048, 64, True, backward, dtype)


def compiled_cells(device: str) -> Iterator[AttentionCell]:
    """Those that are measured against torch.compile of the eager formula."""
    sizes = (8192, WIDTH, 2048, 128) if device == "cuda" else (34, 16, 17, 8)
    dtype = "bfloat16" if device == "cuda" else "float32"
    for backward in (False, True):
        yield cell(device, *sizes, True, backward, dtype, peers.ATTENTION_COMPILED)


def cell(
    device: str,
    tokens: int,
    width: int,
    seqlen: int,
    head_dim: int,
    causal: bool,
    backward: bool,
    dtype: str,
    against: Mapping[str, Callable[..., peers.Peer]] = peers.ATTENTION,
) -> AttentionCell:
    """The cell of `tokens` = batch * seqlen and `width` = heads * head_dim."""
    return AttentionCell(
        op="attention",
        device=device,
        dtype=dtype,
        backward=backward,
        against=against,
        batch=tokens // seqlen,
        seqlen=seqlen,
        heads=width // head_dim,
        head_dim=head_dim,
        causal=causal,
    )
