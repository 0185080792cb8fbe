"""Attention's features and decoding on one device: fastattn against what PyTorch users write.

A feature is measured against F.scaled_dot_product_attention with the mask or bias that says the
same, and against our own plain causal call ("plain causal"), whose time shows what the feature
costs, or what skipped tiles save. Decoding is measured in bytes of the cache, beside a copy of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from attention import AttentionCell
from harness import Cell
from peers import Outputs, Peer, Refused, compiled
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

MASK_LIMIT = 4 << 30


@dataclass(frozen=True, kw_only=True)
class FeatureCell(AttentionCell):
    """Causal self-attention with one more argument, or a bias of (1, heads, seqlen, seqlen)."""

    feature: str
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = True

    @property
    def axes(self) -> dict[str, object]:
        return super().axes | {"feature": self.feature} | self.options

    @property
    def flops(self) -> float:
        window = self.options.get("window")
        share = 1.0 if window is None else min(1.0, 2.0 * (window[0] + 1) / self.seqlen)
        return super().flops * share

    def inputs(self) -> tuple[Tensor, ...]:
        tensors = super().inputs()
        if self.feature != "bias":
            return tensors
        shape = (1, self.heads, self.seqlen, self.seqlen)
        return (*tensors, torch.randn(shape, device=self.device, dtype=self.torch_dtype))

    def definition(self, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if "softcap" in self.options:
            scores = self.options["softcap"] * torch.tanh(scores / self.options["softcap"])
        if bias:
            scores = scores + bias[0]
        scores = scores.masked_fill(~self.seen(q.device), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def part(self, tensor: Tensor) -> Tensor:
        whole = tensor.shape[-1] == tensor.shape[-2] == self.seqlen
        return tensor[:, :1] if whole else super().part(tensor)

    def seen(self, device: torch.device) -> Tensor:
        i = torch.arange(self.seqlen, device=device)
        seen = i <= i[:, None]
        if "window" in self.options:
            seen &= i >= i[:, None] - self.options["window"][0]
        return seen


def ours(cell: FeatureCell) -> Peer:
    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        added = bias[0] if bias else None
        return fastattn.attention(q, k, v, causal=True, bias=added, **cell.options)

    return Peer(call)


def plain_causal(cell: FeatureCell) -> Peer:
    if cell.backward:
        raise Refused("the forward alone is set against it")
    return Peer(lambda q, k, v, *_: fastattn.attention(q, k, v, causal=True), ceiling=True)


def sdpa_masked(cell: FeatureCell) -> Peer:
    """F.sdpa with the window as a boolean mask, or with the bias under the causal mask."""
    if "softcap" in cell.options:
        raise Refused("F.scaled_dot_product_attention has no softcap")
    seen = cell.seen(torch.device(cell.device))
    if cell.feature == "bias" and cell.heads * seen.numel() * 4 > MASK_LIMIT:
        raise Refused("the mask would take more than 4 GiB")

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        mask = bias[0].masked_fill(~seen, float("-inf")) if bias else seen
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    return Peer(call)


def sdpa_efficient(cell: FeatureCell) -> Peer:
    if cell.device != "cuda":
        raise Refused("the memory-efficient kernels are CUDA's")
    peer = sdpa_masked(cell)
    return replace(peer, context=lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))


def flex(cell: FeatureCell) -> Peer:
    """torch's FlexAttention, compiled; its block mask is made beforehand."""
    if cell.device != "cuda" or "window" not in cell.options:
        raise Refused("measured for windows on a GPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left = cell.options["window"][0]

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= left)

    blocks = create_block_mask(rule, None, None, cell.seqlen, cell.seqlen, device=cell.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=blocks).transpose(1, 2)

    return compiled(Peer(call), cell.device)


FEATURE_PEERS = {
    "ours": ours,
    "plain causal": plain_causal,
    "sdpa mask": sdpa_masked,
    "sdpa efficient": sdpa_efficient,
    "flex": flex,
}


def feature_cells(device: str) -> Iterator[FeatureCell]:
    """What `gpu_check` measures, the most telling first."""
    tokens, long, short = (16384, 16384, 2048) if device == "cuda" else (66, 48, 33)
    window = (1023, 0) if device == "cuda" else (7, 0)
    wanted: list[tuple[str, dict[str, Any], int]] = [
        ("window", {"window": window}, long),
        ("bias", {}, 2 * short),  # in a batch of one, or its gradient were no head's own
        ("softcap", {"softcap": 30.0}, short),
    ]
    for (feature, options, seqlen), backward in itertools.product(wanted, (False, True)):
        yield FeatureCell(
            op="attention",
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            backward=backward,
            against=FEATURE_PEERS,
            batch=1 if feature == "bias" else max(1, tokens // seqlen),
            seqlen=seqlen,
            heads=16 if device == "cuda" else 2,
            head_dim=128 if device == "cuda" else 16,
            feature=feature,
            options=options,
        )


# --- decoding -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecodeCell(Cell):
    """One query for each sequence of a batch, on a full cache; paged if `page_size` is not 0."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    @property
    def axes(self) -> dict[str, object]:
        names = ("batch", "seqlen", "heads", "kv_heads", "head_dim", "page_size")
        return {name: getattr(self, name) for name in names}

    @property
    def bytes(self) -> float:
        elements = 2 * self.batch * self.seqlen * self.kv_heads * self.head_dim
        return float(elements * self.torch_dtype.itemsize)

    @property
    def lengths(self) -> Tensor:
        return torch.full((self.batch,), self.seqlen, dtype=torch.int32, device=self.device)

    @property
    def block_table(self) -> Tensor | None:
        """Pages in no order, the same in every call."""
        if not self.page_size:
            return None
        each = self.seqlen // self.page_size
        order = torch.randperm(self.batch * each, generator=torch.Generator().manual_seed(0))
        return order.view(self.batch, each).to(device=self.device, dtype=torch.int32)

    def inputs(self) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": self.device, "dtype": self.torch_dtype}
        rows, slots = self.batch, self.seqlen
        if self.page_size:
            rows, slots = self.batch * self.seqlen // self.page_size, self.page_size
        q = torch.randn(self.batch, 1, self.heads, self.head_dim, **options)
        shape = (rows, slots, self.kv_heads, self.head_dim)
        return q, torch.randn(shape, **options), torch.randn(shape, **options)

    def definition(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (table := self.block_table) is not None:
            k, v = (x[table.long()].flatten(1, 2) for x in (k, v))
        group = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q * self.head_dim**-0.5, k)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def _decode(num_splits: int | None) -> Any:
    def make(cell: DecodeCell) -> Peer:
        lengths, table = cell.lengths, cell.block_table

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention_with_kv_cache(
                q, k, v, lengths, block_table=table, num_splits=num_splits
            )

        return Peer(call)

    return make


def decode_sdpa(cell: DecodeCell) -> Peer:
    if cell.page_size:
        raise Refused("F.scaled_dot_product_attention knows no pages")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = cell.heads != cell.kv_heads
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)

    return Peer(call)


def decode_copy(cell: DecodeCell) -> Peer:
    """A copy of the cache: it reads and writes its bytes once each."""
    return Peer(lambda q, k, v: (k.clone(), v.clone()), ceiling=True, bytes=2.0 * cell.bytes)


DECODE_PEERS = {
    "ours": _decode(None),
    "ours by occupancy": _decode(0),
    "sdpa": decode_sdpa,
    "copy": decode_copy,
}


def decode_cells(device: str) -> Iterator[DecodeCell]:
    """What `gpu_check` measures, the most telling first."""
    sizes = (16, 4096, 32, 128, 16) if device == "cuda" else (2, 64, 4, 16, 16)
    batch, seqlen, heads, head_dim, page_size = sizes
    for kv_heads, pages in itertools.product((heads, heads // 4), (page_size, 0)):
        yield DecodeCell(
            op="decode",
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            backward=False,
            against=DECODE_PEERS,
            batch=batch,
            seqlen=seqlen,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=pages,
        )
