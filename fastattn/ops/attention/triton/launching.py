"""Shared by the launchers of forward, backward and decoding: layouts, pointers, strides."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.triton.scores import LOG2_E
from fastattn.ops.common import dropout, launch

# Integer arguments that change from call to call. None may be part of a compiled kernel's key, and
# what the kernels need to know of strides is said by ALIGN. The width of an integer is part of the
# key: arguments that can pass 2^31 are declared tl.int64.
SIZES = [
    *(f"stride_{x}{d}" for x in "qkvodg" for d in "bsh"),
    *(f"stride_{x}{d}" for x in "mb" for d in "bhqk"),
    "stride_lb", "stride_lh", "stride_slope", "stride_qd", "stride_kd", "stride_block_b",
    "stride_block_h", "stride_table", "stride_part_out", "stride_part_lse", "heads", "kv_heads",
    "group_size", "batch_size", "seqlen_q", "seqlen_k", "tiles_m", "tiles_n", "splits",
    "longest_q", "longest_k", "seqlen_new", "pages", "split_length", "page_size", "rotary_half",
    "rotary_positions", "low", "high", "threshold",
]  # fmt: skip

# Offsets inside a tile are 32-bit, and a tile has at most 128 rows (tiles.py).
MAX_ROW_STRIDE = 2**31 // 128 - 1

# Positions are 32-bit: a side of the window that is wider than any sequence must not pass 2^31.
MAX_WINDOW = 2**30


@dataclass(frozen=True)
class Layout:
    """How q, k and v lie in memory. Packed ones are a batch of 1 to the kernels' strides."""

    device: torch.device
    element_size: int
    packed: bool
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    seqlen_q: int  # packed: total_q
    seqlen_k: int  # packed: total_k; of a paged cache: what a row of the block table can hold
    longest_q: int
    longest_k: int
    align: int
    strides: tuple[int, ...]  # (batch, token, head) of q, k, v and more, in units of `align`


def layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
    *more: torch.Tensor,
    capacity: int | None = None,
) -> Layout:
    """Sizes, strides and dtypes of q, k and v, for a launcher.

    Args:
        more: tensors beside them with strides in units of `align`.
        capacity: keys that a sequence of a paged cache can have, if k and v are one.
    """
    cu_seqlens = extras.cu_seqlens_q
    packed = cu_seqlens is not None
    align = alignment(q, k, v, *more)
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3] if capacity is None else capacity
    return Layout(
        device=q.device,
        element_size=q.element_size(),
        packed=packed,
        batch=q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        longest_q=settings.max_seqlen_q if packed else seqlen_q,
        longest_k=settings.max_seqlen_k if packed else seqlen_k,
        align=align,
        strides=tuple(n for x in (q, k, v, *more) for n in units(x, align)),
    )


_BLOCKS = Extras._fields.index("blocks")


def key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    settings: Settings,
    *more: torch.Tensor | None,
) -> Hashable:
    """All of a call's metadata: what a launcher computes from it is kept under this key."""
    single: tuple[Any, ...] = (*extras[:_BLOCKS], *extras[_BLOCKS + 1 :])
    tensors = (q, k, v, *single, *more, *(extras.blocks or ()))
    facts = [x if x is None else (x.dtype, x.shape, x.stride()) for x in tensors]
    return tuple(facts), settings, q.device, tuple(tiles.overrides.items())


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where the kernels can read it, else a copy.

    They read any strides but a strided last dimension and tokens 2^24 elements apart.
    """
    return x if x.stride(-1) == 1 and x.stride(-3) <= MAX_ROW_STRIDE else x.contiguous()


def token_strides(x: torch.Tensor) -> tuple[int, ...]:
    """(batch, token, head) strides, of packed tensors (0, token, head).

    Those of dimensions of size 1, which may be anything, are 0.
    """
    strides = tuple(0 if n == 1 else s for n, s in zip(x.shape[:-1], x.stride()))
    return strides if x.dim() == 4 else (0, *strides)


def alignment(*tensors: torch.Tensor) -> int:
    """The ALIGN of a kernel: elements that divide every stride and width, at most 16.

    16 elements are what a wide load or store of any dtype needs; few layouts have less. The widths
    count too, or a dimension of size 1, which has no stride, would compile another kernel.
    """
    strides = (n for x in tensors for n in token_strides(x))
    return math.gcd(16, *(x.shape[-1] for x in tensors), *strides)


def units(x: torch.Tensor, align: int) -> tuple[int, ...]:
    """(batch, token, head) strides in units of `align`."""
    return tuple(n // align for n in token_strides(x))


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

    block_table: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None  # both of one shape
    v_scale: torch.Tensor | None = None
    used: bool = False
    capacity: int | None = None  # keys that a sequence can have
    seqlen_new: int = 0
    rotary_interleaved: bool = False
    rotary_advances: bool = False
    num_splits: int | None = None

    @property
    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        return self[:7]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self[7:]


NO_CACHE = Cache()


def result_strides(x: Layout, heads: int, tokens: int, width: int) -> tuple[int, int, int]:
    """(batch, token, head) strides of a contiguous result, in units of `align`."""
    batch, token, head = tokens * heads * width, heads * width, width
    return 0 if x.packed else batch // x.align, token // x.align, head // x.align


def lse_strides(x: Layout) -> tuple[int, int]:
    """(batch, head) strides of the LSE."""
    return (0 if x.packed else x.heads * x.seqlen_q), x.seqlen_q


# The kernels read these as contiguous tensors; a mask and a bias keep their strides.
_VECTORS = [name for name in Extras._fields if name not in ("mask", "bias", "blocks")]


def prepared(
    extras: Extras, *tensors: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], Extras, bool]:
    """The tensors and extras as the kernels can read them, and whether any had to be copied."""
    vectors: dict[str, Any] = {
        name: x.contiguous() for name in _VECTORS if (x := getattr(extras, name)) is not None
    }
    given = (*tensors, *(getattr(extras, name) for name in vectors))
    can_be_read = tuple(map(readable, tensors))
    copies = any(x is not y for x, y in zip(given, (*can_be_read, *vectors.values())))
    return can_be_read, extras._replace(**vectors), copies


def pointers(extras: Extras, *, transposed: bool) -> tuple[torch.Tensor | None, ...]:
    """From mask_ptr to seed_ptr, in the kernels' order; `transposed` the block mask by columns."""
    return (
        None if extras.mask is None else _near(extras.mask).view(torch.uint8),
        None if extras.bias is None else _near(extras.bias),
        extras.alibi_slopes,
        extras.key_lengths,
        extras.q_documents,
        extras.k_documents,
        *_block_pointers(extras, transposed),
        extras.cu_seqlens_q,
        extras.cu_seqlens_k,
        extras.seqused_q,
        extras.seqused_k,
        extras.dropout_seed,
    )


def _near(x: torch.Tensor) -> torch.Tensor:
    """A mask or bias whose rows and columns 32-bit offsets reach within a tile."""
    return x if max(_broadcast_strides(x)[2:]) <= MAX_ROW_STRIDE else x.contiguous()


def strides(x: Layout, extras: Extras, *, transposed: bool) -> tuple[int, ...]:
    """From stride_mb to stride_block_h, in the kernels' order, as `pointers`."""
    slopes = extras.alibi_slopes
    padded = extras.q_documents is not None and not x.packed
    return (
        *_broadcast_strides(None if extras.mask is None else _near(extras.mask)),
        *_broadcast_strides(None if extras.bias is None else _near(extras.bias)),
        0 if slopes is None or slopes.shape[0] == 1 else x.heads,
        x.seqlen_q if padded else 0,
        x.seqlen_k if padded else 0,
        *_block_strides(extras, transposed),
    )


def _broadcast_strides(x: torch.Tensor | None) -> tuple[int, ...]:
    """Strides by which a tensor with dimensions of size 1 reads as the whole."""
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride()))


def _block_pointers(extras: Extras, transposed: bool) -> tuple[torch.Tensor | None, ...]:
    """offsets, indices, partial, patterns of the block mask, by rows of tiles or by columns."""
    if extras.blocks is None:
        return (None,) * 4
    offsets, indices, partial, patterns = extras.blocks[:4]
    if transposed:
        offsets, indices, partial = extras.blocks[4:]
    if len(patterns) == 1:  # all tiles are seen whole
        return offsets, indices, None, None
    return offsets, indices, partial, patterns.view(torch.uint8)


def _block_strides(extras: Extras, transposed: bool) -> tuple[int, int]:
    """(batch, head) strides of the block mask's offsets."""
    if extras.blocks is None:
        return (0, 0)
    offsets = extras.blocks[4 if transposed else 0]
    batch, head, rows = offsets.shape
    return (0 if batch == 1 else head * rows), (0 if head == 1 else rows)


def tile(kernel: str, x: Layout, extras: Extras, settings: Settings) -> tiles.Tile:
    """The row of tiles.py for this call, inside the tiles of its block mask."""
    architecture, width = launch.architecture(x.device), max(x.head_dim, x.head_dim_v)
    row = tiles.tile(kernel, architecture, x.element_size, width, tiles.masking(extras, settings))
    return row.within(settings.block_q, settings.block_k)


def constants(x: Layout, settings: Settings, tile: tiles.Tile) -> dict[str, Any]:
    """The constants of all kernels: scores.Sizes, warps and stages."""
    return {
        "HEAD_DIM": x.head_dim,
        "HEAD_DIM_V": x.head_dim_v,
        "BLOCK_D": tiles.block_d(x.head_dim),
        "BLOCK_DV": tiles.block_d(x.head_dim_v),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_MASK_Q": settings.block_q,
        "BLOCK_MASK_K": settings.block_k,
        "TOP_LEFT": settings.top_left,
        "ALIGN": x.align,
        "PRECISION": settings.fp32_precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def band(settings: Settings) -> tuple[int | None, int | None]:
    """(low, high): query i sees the keys from i + d + low to i + d + high, None for no bound."""
    left, right = (min(n, MAX_WINDOW) for n in (settings.window_left, settings.window_right))
    return (None if left < 0 else -left), (None if right < 0 else right)


def arithmetic(settings: Settings) -> tuple[Any, ...]:
    """low, high, scale, softcap, threshold, inverse_keep, in the kernels' order."""
    return (
        *band(settings),
        scale(settings),
        softcap(settings),
        dropout.threshold(settings.dropout_p),
        1.0 / (1.0 - settings.dropout_p),
    )


# Below, a scale may be zero in float32, and zero times -inf is NaN.
LEAST_SCALE = 1e-37


def scale(settings: Settings) -> float:
    """The factor of q k^T: to base 2, unless a softcap comes first."""
    return in_float32(settings.softmax_scale * (1.0 if settings.softcap else LOG2_E.value))


def softcap(settings: Settings) -> float | None:
    """Cut to what float32 holds with its inverse, as csrc/attention/launchers.cuh does it."""
    return min(max(settings.softcap, 1e-20), 1e20) if settings.softcap else None


def in_float32(number: float) -> float:
    """0 for what is smaller than a normal float32: Triton 3.6 would compute in float64 with it."""
    return number if abs(number) >= 2.0**-126 else 0.0


def rotary_sizes(cache: Cache) -> tuple[int, int]:
    """(rotary_dim / 2, positions) of the tables of cosines and sines."""
    if cache.rotary_cos is None:
        return (0, 0)
    positions, half = cache.rotary_cos.shape
    return half, positions
