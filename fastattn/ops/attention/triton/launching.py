"""What the launchers of forward, backward and decoding share: operands, pointers, strides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton.scores import LOG2_E

# Integer arguments that change from call to call. None may be part of a compiled kernel's key, and
# what the kernels need to know of strides is said by ALIGN. The width of an integer is part of the
# key: arguments that can pass 2^31 are declared tl.int64.
SIZES = [
    *(f"stride_{x}{d}" for x in "qkvodg" for d in "bsh"),
    *(f"stride_{x}{d}" for x in "mb" for d in "bhqk"),
    "stride_lb", "stride_lh", "stride_slope", "stride_qd", "stride_kd", "stride_block_b",
    "stride_block_h", "stride_table", "part_out_stride", "part_lse_stride", "heads", "kv_heads",
    "group_size", "batch_size", "seqlen_q", "seqlen_k", "tiles_m", "tiles_n", "splits",
    "longest_q", "longest_k", "seqlen_new", "pages", "split_length", "page_size", "rotary_half",
    "rotary_positions", "low", "high", "threshold",
]  # fmt: skip

# Offsets inside a tile are 32-bit, and a tile has at most 128 rows (tiles.py).
MAX_ROW_STRIDE = 2**31 // 128 - 1

# Positions are 32-bit: a side of the window that is wider than any sequence must not pass 2^31.
MAX_WINDOW = 2**30


@dataclass(frozen=True)
class Operands:
    """q, k and v as the kernels read them: 4-D; packed ones with a batch of 1."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    packed: bool
    batch: int
    seqlen_k: int  # packed: total_k; of a paged cache: what a row of the block table can hold
    longest_q: int
    longest_k: int
    align: int

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[3]

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[1]

    def units(self, x: torch.Tensor) -> tuple[int, ...]:
        """(batch, token, head) strides in units of `align`."""
        return tuple(n // self.align for n in token_strides(x, self.packed))

    def widths(self) -> dict[str, Any]:
        return {
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_D": tiles.block_d(self.head_dim),
            "BLOCK_DV": tiles.block_d(self.head_dim_v),
            "ALIGN": self.align,
        }


def operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
    *more: torch.Tensor,
    capacity: int | None = None,
) -> Operands:
    """What a launcher needs to know of q, k and v.

    Args:
        more: tensors beside them whose strides count for `align`.
        capacity: keys that a sequence of a paged cache can have, if k and v are one.
    """
    cu_seqlens = extras.cu_seqlens_q
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    q, k, v = readable(q), readable(k), readable(v)
    # 16 elements are what a wide load of any dtype needs; few layouts have less. The widths count
    # too, or a dimension of size 1, which has no stride, would compile another kernel.
    strides = (n for x in (q, k, v, *more) for n in token_strides(x, packed))
    align = math.gcd(16, q.shape[3], v.shape[3], *strides)
    seqlen_k = k.shape[1] if capacity is None else capacity
    return Operands(
        q=q,
        k=k,
        v=v,
        packed=packed,
        batch=q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        seqlen_k=seqlen_k,
        longest_q=settings.max_seqlen_q if packed else q.shape[1],
        longest_k=settings.max_seqlen_k if packed else seqlen_k,
        align=align,
    )


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where the kernels can read it, else a copy.

    They read any strides but a strided last dimension and tokens 2^24 elements apart.
    """
    return x if x.stride(-1) == 1 and x.stride(1) <= MAX_ROW_STRIDE else x.contiguous()


def token_strides(x: torch.Tensor, packed: bool = False) -> tuple[int, int, int]:
    """(batch, token, head) strides; those of dimensions of size 1, which may be anything, are 0."""
    batch, token, head = (0 if n == 1 else s for n, s in zip(x.shape[:3], x.stride()))
    return 0 if packed else batch, token, head


def outputs(x: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), which the kernels fill, tokens in no sequence included."""
    shape = (*x.q.shape[:3], x.head_dim_v)
    lines = (x.heads, x.seqlen_q) if x.packed else (x.batch, x.heads, x.seqlen_q)
    out = x.q.new_empty(shape[1:] if x.packed else shape)
    lse = x.q.new_empty(lines, dtype=torch.float32)
    if x.packed and not x.batch * x.longest_q:  # then no kernel runs
        out.zero_()
        lse.fill_(float("-inf"))
    return out, lse


def parts(out: torch.Tensor, lse: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the results of `splits` parts of the keys.

    One part is the whole and needs none, but the kernel is compiled for any number of them.
    """
    if splits == 1:
        return lse, lse
    return out.new_empty((splits, *out.shape), dtype=torch.float32), lse.new_empty(
        (splits, *lse.shape)
    )


class Cache(NamedTuple):
    """How the keys of a cache are found, and what is done with q on the way."""

    used: bool = False
    block_table: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    seqlen_new: int = 0
    rotary_interleaved: bool = False
    rotary_advances: bool = False
    num_splits: int | None = None


NO_CACHE = Cache()


def lse_strides(x: Operands) -> tuple[int, int]:
    """(batch, head) strides of the LSE."""
    return (0 if x.packed else x.heads * x.seqlen_q), x.seqlen_q


# What the kernels read as if it were contiguous.
_DENSE = (
    "alibi_slopes", "sink", "key_lengths", "q_documents", "k_documents", "cu_seqlens_q",
    "cu_seqlens_k", "seqused_q", "seqused_k",
)  # fmt: skip


def dense(extras: Extras) -> Extras:
    """The extras with every vector contiguous; mask and bias keep their strides."""
    given = ((name, getattr(extras, name)) for name in _DENSE)
    return extras._replace(**{name: x.contiguous() for name, x in given if x is not None})


def feature_pointers(x: Operands, extras: Extras) -> tuple[torch.Tensor | None, ...]:
    """mask, bias, slopes, sink, key_lengths, q_documents, k_documents."""
    mask = None if extras.mask is None else _near(extras.mask).view(torch.uint8)
    return (
        mask,
        None if extras.bias is None else _near(extras.bias),
        extras.alibi_slopes,
        extras.sink,
        extras.key_lengths,
        extras.q_documents,
        extras.k_documents,
    )


def _near(x: torch.Tensor) -> torch.Tensor:
    """A mask or bias whose rows and columns 32-bit offsets reach within a tile."""
    return x if max(broadcast_strides(x)[2:]) <= MAX_ROW_STRIDE else x.contiguous()


def sequence_pointers(extras: Extras) -> tuple[torch.Tensor | None, ...]:
    """cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k."""
    return extras.cu_seqlens_q, extras.cu_seqlens_k, extras.seqused_q, extras.seqused_k


def feature_strides(x: Operands, extras: Extras) -> tuple[int, ...]:
    """Strides of mask (4), bias (4), slopes, q_documents and k_documents (from batch to batch)."""
    slopes = extras.alibi_slopes
    padded = extras.q_documents is not None and not x.packed
    return (
        *broadcast_strides(None if extras.mask is None else _near(extras.mask)),
        *broadcast_strides(None if extras.bias is None else _near(extras.bias)),
        0 if slopes is None or slopes.shape[0] == 1 else x.heads,
        x.seqlen_q if padded else 0,
        x.seqlen_k if padded else 0,
    )


def broadcast_strides(x: torch.Tensor | None) -> tuple[int, ...]:
    """Strides by which a tensor with dimensions of size 1 reads as the whole."""
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride()))


def block_pointers(extras: Extras, *, transposed: bool) -> tuple[torch.Tensor | None, ...]:
    """offsets, indices, partial, patterns of the block mask, by rows of tiles or by columns."""
    if extras.blocks is None:
        return (None,) * 4
    offsets, indices, partial, patterns = extras.blocks[:4]
    if transposed:
        offsets, indices, partial = extras.blocks[4:]
    if len(patterns) == 1:  # all tiles are seen whole
        return offsets, indices, None, None
    return offsets, indices, partial, patterns.view(torch.uint8)


def block_strides(extras: Extras, *, transposed: bool) -> tuple[int, int]:
    """(batch, head) strides of the block mask's offsets."""
    if extras.blocks is None:
        return (0, 0)
    offsets = extras.blocks[4 if transposed else 0]
    batch, head, rows = offsets.shape
    return (0 if batch == 1 else head * rows), (0 if head == 1 else rows)


def band(settings: Settings) -> tuple[int | None, int | None]:
    """(low, high): query i sees the keys from i + d + low to i + d + high, None for no bound."""
    left, right = (min(n, MAX_WINDOW) for n in (settings.window_left, settings.window_right))
    return (None if left < 0 else -left), (None if right < 0 else right)


# Below, a scale may be zero in float32, and zero times -inf is NaN.
LEAST_SCALE = 1e-37


def scale(settings: Settings) -> float:
    """What q k^T is multiplied with: to base 2, unless a softcap comes first."""
    return settings.softmax_scale * (1.0 if settings.softcap else LOG2_E.value)


def rotary_sizes(cache: Cache) -> tuple[int, int]:
    """(rotary_dim / 2, positions) of the tables of cosines and sines."""
    if cache.rotary_cos is None:
        return (0, 0)
    positions, half = cache.rotary_cos.shape
    return half, positions
