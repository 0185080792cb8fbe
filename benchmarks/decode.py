"""Decoding: attention of a few new queries on a long cache of keys and values, contiguous or paged.

One query for each sequence of a batch, on a full cache, or on one with room for many more keys
(`--capacity`), which must cost nothing; `--page-size 0` is a contiguous one. The work is reading
the keys and values, so rates are in bytes of these, and the ceiling is a copy of them (which reads
and writes as many) in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import checkout  # noqa: F401
import torch
from harness import OURS, Cell
from peer import Peer, Refused, first, imported
from script import DTYPE, Axis, Subject, grids, main
from torch import Tensor
from torch.nn import functional as F

import fastattn

LARGEST_IN_FLOAT64 = 1 << 30  # bytes of a cache


@dataclass(frozen=True, kw_only=True)
class DecodeCell(Cell):
    """`seqlen_q` queries for each of `batch` sequences of `seqlen` keys; room for `capacity`."""

    batch: int
    seqlen_q: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    capacity: int = 0  # 0: seqlen

    sizes = (
        "batch", "seqlen_q", "seqlen", "heads", "kv_heads", "head_dim", "page_size", "capacity",
    )  # fmt: skip
    bound = "copy"

    @property
    def room(self) -> int:
        return self.capacity or self.seqlen

    @property
    def bytes(self) -> float:
        elements = 2 * self.batch * self.seqlen * self.kv_heads * self.head_dim
        return float(elements * self.torch_dtype.itemsize)

    @property
    def reference(self) -> str:
        """A float64 copy of a large cache, its heads repeated, would not fit beside it."""
        return "float32" if self.bytes > LARGEST_IN_FLOAT64 else "float64"

    @property
    def lengths(self) -> Tensor:
        return torch.full((self.batch,), self.seqlen, dtype=torch.int32, device=self.device)

    @property
    def block_table(self) -> Tensor | None:
        """Pages in no order, the same in every call; page 0 where a sequence has none yet."""
        if not self.page_size:
            return None
        each, columns = (-(-n // self.page_size) for n in (self.seqlen, self.room))
        order = torch.randperm(self.batch * each, generator=torch.Generator().manual_seed(0))
        table = torch.zeros(self.batch, columns, dtype=torch.int32)
        table[:, :each] = order.view(self.batch, each)
        return table.to(self.device)

    def inputs(self) -> tuple[Tensor, ...]:
        rows, slots = self.batch, self.room
        if self.page_size:
            rows, slots = self.batch * -(-self.seqlen // self.page_size), self.page_size
        q = self.randn(self.batch, self.seqlen_q, self.heads, self.head_dim)
        shape = (rows, slots, self.kv_heads, self.head_dim)
        return q, self.randn(*shape), self.randn(*shape)

    def definition(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (table := self.block_table) is not None:
            pages = table[:, : -(-self.seqlen // self.page_size)].long()
            k, v = (x[pages].flatten(1, 2) for x in (k, v))
        k, v = (x[:, : self.seqlen] for x in (k, v))
        group = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q * self.head_dim**-0.5, k)
        i = torch.arange(self.seqlen_q, device=q.device)[:, None] + self.seqlen - self.seqlen_q
        hidden = torch.arange(self.seqlen, device=q.device) > i
        return torch.einsum(
            "bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v
        )


# --- peers ----------------------------------------------------------------------------------------


def _ours(num_splits: int | None) -> Callable[[DecodeCell], Peer]:
    def make(cell: DecodeCell) -> Peer:
        lengths, table = cell.lengths, cell.block_table

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention_with_kv_cache(
                q, k, v, lengths, block_table=table, causal=True, num_splits=num_splits
            )

        return Peer(call)

    return make


def sdpa(cell: DecodeCell) -> Peer:
    if cell.page_size:
        raise Refused("F.scaled_dot_product_attention knows no pages")
    mask = None
    if cell.seqlen_q > 1:
        mask = torch.ones(cell.seqlen_q, cell.seqlen, dtype=torch.bool, device=cell.device)
        mask = mask.tril(cell.seqlen - cell.seqlen_q)
    grouped = cell.heads != cell.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k[:, : cell.seqlen], v[:, : cell.seqlen]))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped).transpose(1, 2)

    return Peer(call)


def eager(cell: DecodeCell) -> Peer:
    return Peer(cell.definition)


def _flash(module: str, package: str, pages: str) -> Callable[[DecodeCell], Peer]:
    """A version of flash-attn; `pages` is its word for the block table."""

    def make(cell: DecodeCell) -> Peer:
        function = imported(module, package).flash_attn_with_kvcache
        if cell.dtype == "float32":
            raise Refused(f"{package} has no float32")
        if package == "flash-attn 2" and cell.page_size % 256:
            raise Refused("its pages are multiples of 256 keys")
        options = {"cache_seqlens": cell.lengths, pages: cell.block_table, "causal": True}
        return Peer(lambda q, k, v: first(function(q, k, v, **options)))

    return make


def copy(cell: DecodeCell) -> Peer:
    """A copy of what the cache holds: it reads and writes its bytes once each."""
    held = slice(None if cell.page_size else cell.seqlen)
    return Peer(
        lambda q, k, v: (k[:, held].clone(), v[:, held].clone()),
        ceiling=True,
        bytes=2.0 * cell.bytes,
    )


PEERS = {
    OURS: _ours(None),
    "copy": copy,
    "ours by occupancy": _ours(0),
    "eager": eager,
    "sdpa": sdpa,
    "flash-attn 2": _flash("flash_attn", "flash-attn 2", "block_table"),
    "flash-attn 3": _flash("flash_attn_interface", "flash-attn 3", "page_table"),
}


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "batch": Axis("sequences"),
    "seqlen_q": Axis("new queries of each, causal among themselves"),
    "seqlen": Axis("keys of each"),
    "heads": Axis("of queries"),
    "kv_heads": Axis("of keys and values"),
    "head_dim": Axis("of q, k and v"),
    "page_size": Axis("keys of a page; 0: a contiguous cache"),
    "capacity": Axis("keys that each has room for; 0: as many as it has"),
    "dtype": DTYPE,
}


def make(*, device: str, heads: int, kv_heads: int, dtype: str, **sizes: int) -> DecodeCell | None:
    """The cell of one value for each axis; None where heads do not divide or keys have no room."""
    if heads % kv_heads or sizes["seqlen_q"] > sizes["seqlen"]:
        return None
    if 0 < sizes.get("capacity", 0) < sizes["seqlen"]:
        return None
    return DecodeCell(
        op="decode", device=device, dtype=dtype, against=PEERS, heads=heads, kv_heads=kv_heads,
        **sizes,
    )  # fmt: skip


grid = grids(
    dtype=["bfloat16"], batch=[16], seqlen_q=[1], seqlen=[4096], heads=[32], kv_heads=[32, 8],
    head_dim=[128], page_size=[16, 0], capacity=[0],
)  # fmt: skip
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
ROOM = 131072  # beside a length far below it
PRESETS = {
    ("cuda", "quick"): [
        grid(),
        grid(batch=[1], seqlen=[16384], page_size=[16], kv_heads=[8]),
        grid(seqlen=[1024], page_size=[16], kv_heads=[8], capacity=[0, ROOM]),
    ],
    ("cuda", "full"): [
        grid(seqlen=LENGTHS),
        grid(batch=[1, 4, 64], kv_heads=[8]),
        grid(page_size=[1, 64, 256], kv_heads=[8]),
        grid(head_dim=[64, 256], kv_heads=[8]),
        grid(seqlen_q=[2, 4], kv_heads=[8]),
        grid(batch=[1, 16, 64], seqlen=[512, 4096], page_size=[16], kv_heads=[8], capacity=[ROOM]),
        grid(seqlen=[512, 4096], page_size=[0], kv_heads=[8], capacity=[ROOM]),
    ],
    ("cuda", "paper"): [grid(seqlen=[2000, 4000, *LENGTHS])],
    ("cpu", "quick"): [
        grid(dtype=["float32"], batch=[2], seqlen=[512, 1024, 2048], heads=[8], kv_heads=[8, 2],
             head_dim=[64]),
    ],
    ("cpu", "full"): [
        grid(dtype=["float32"], batch=[1, 4], seqlen=LENGTHS, heads=[12], kv_heads=[12, 4],
             head_dim=[64]),
    ],
}  # fmt: skip
SUBJECT = Subject("decode", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
