"""A call of attention apart from its data, and every error that a user can make."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch

from fastattn.ops.attention.block_mask import BlockMask
from fastattn.ops.attention.call import (
    UNBOUNDED,
    Causal,
    Documents,
    Extras,
    Features,
    Learnt,
    Settings,
)
from fastattn.ops.common import descriptors, modes
from fastattn.ops.common.dense import DTYPES, INDEX_DTYPES, check_dense, dtype_name

MAX_TRACED_SEQLEN = 2**29  # of a sequence of which torch.compile knows no length
FP32_PRECISIONS = ("ieee", "tf32x3")
# Where a nested tensor belongs.
VARLEN = (
    "use fastattn.attention_varlen(q.values(), k.values(), v.values(), cu_seqlens_q, cu_seqlens_k) "
    "with the offsets() of q and k, or pad it with torch.nested.to_padded_tensor and give "
    "key_lengths"
)


@dataclass(frozen=True)
class AttentionProblem:
    """Metadata of one call; the checks have passed before a backend sees it."""

    batch: int
    seqlen_q: int  # of a packed call: the longest
    seqlen_k: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    settings: Settings
    given: tuple[str, ...]  # names of the extras that are there
    wide: tuple[str, ...]  # of those, bias and sink in float32 beside a 16-bit q
    is_empty: bool
    return_lse: bool
    needs_grad: bool
    needs_bias_grad: bool
    bias_is_row: bool  # one row of scores' terms for all queries
    needs_slope_grad: bool
    transformed: bool
    misfit: str | None = None  # why TMA cannot read q, k or v where they lie; only `explain` asks

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extras: Extras,
        settings: Settings,
        *,
        return_lse: bool,
    ) -> AttentionProblem:
        """The problem of a call whose arguments have been checked."""
        cu_seqlens = extras.cu_seqlens_q
        packed = cu_seqlens is not None
        slopes = extras.alibi_slopes
        return cls(
            batch=q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            seqlen_q=settings.max_seqlen_q if packed else q.shape[1],
            seqlen_k=settings.max_seqlen_k if packed else k.shape[1],
            heads=q.shape[-2],
            kv_heads=k.shape[-2],
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            dtype=q.dtype,
            device=q.device,
            settings=settings,
            given=tuple(name for name, x in zip(Extras._fields, extras) if x is not None),
            wide=tuple(
                name
                for name, x in Learnt.of(extras)._asdict().items()
                if x is not None and x.dtype.itemsize > q.dtype.itemsize
            ),
            is_empty=0 in q.shape or 0 in k.shape or 0 in v.shape,
            return_lse=return_lse,
            needs_grad=modes.needs_grad(q, k, v, slopes, *Learnt.of(extras)),
            needs_bias_grad=extras.bias is not None and modes.needs_grad(extras.bias),
            bias_is_row=extras.bias is not None and extras.bias.shape[2] == 1,
            needs_slope_grad=slopes is not None and modes.needs_grad(slopes),
            transformed=modes.transformed(),
        )

    op = "attention"

    @property
    def elements(self) -> int | None:
        """The problem's size where backends are compared (measured.py).

        The multiplications of q k^T, q's elements times seqlen_k; None for whatever is more than
        causal attention, which is not compared.
        """
        s = self.settings
        more = self.given or self.return_lse or self.bounded_left or s.window_right > 0
        if more or s.softcap or s.dropout_p or s.fp32_precision != "ieee":
            return None
        return self.batch * self.seqlen_q * self.heads * self.head_dim * self.seqlen_k

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def packed(self) -> bool:
        """Sequences of different lengths one after another, found by `cu_seqlens`."""
        return "cu_seqlens_q" in self.given

    @property
    def bounded_left(self) -> bool:
        return self.settings.window_left >= 0

    @property
    def bounded_right(self) -> bool:
        return self.settings.window_right >= 0

    @property
    def dropout_p(self) -> float:
        return self.settings.dropout_p

    def describe(self) -> str:
        s = self.settings
        side = {UNBOUNDED: "unbounded"}
        left, right = (side.get(n, str(n)) for n in (s.window_left, s.window_right))
        causal = s.window_right == 0 and s.window_left == UNBOUNDED
        window = "causal" if causal else f"window ({left}, {right})"
        corner = " from the top-left" if s.top_left else ""
        features = [
            window + corner if self.bounded_left or self.bounded_right else "",
            f"softcap={s.softcap}" if s.softcap else "",
            *(name for name in self.given if not name.startswith("cu_seqlens")),
            f"dropout_p={s.dropout_p}" if s.dropout_p else "",
            f"fp32_precision={s.fp32_precision}" if s.fp32_precision != "ieee" else "",
            "" if s.deterministic else "deterministic=False",
            "return_lse" if self.return_lse else "",
            "with gradients" if self.needs_grad else "",
            "under a torch.func transform or forward-mode AD" if self.transformed else "",
        ]
        q = f"({self.batch}, {self.seqlen_q}, {self.heads}, {self.head_dim})"
        k = f"({self.batch}, {self.seqlen_k}, {self.kv_heads}, {self.head_dim})"
        shapes = f"packed q {q}, k {k}" if self.packed else f"q {q}, k {k}"
        if self.head_dim_v != self.head_dim:
            shapes += f", head_dim {self.head_dim_v} of v"
        kind = f"{dtype_name(self.dtype)} on {self.device}"
        return ", ".join([shapes, kind, *filter(None, features)])


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: bool = False,
    **features: Any,
) -> AttentionProblem:
    """The problem of a call of `attention`. Raises for every error of the caller."""
    settings, extras = check(q, k, v, **features)
    return AttentionProblem.of(q, k, v, extras, settings, return_lse=return_lse)


def describe_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *lengths: Any,
    return_lse: bool = False,
    **features: Any,
) -> AttentionProblem:
    """The problem of a call of `attention_varlen`. Raises for every error of the caller."""
    settings, extras = check_varlen(q, k, v, *lengths, **features)
    return AttentionProblem.of(q, k, v, extras, settings, return_lse=return_lse)


def describe_place(describe: Callable[..., AttentionProblem]) -> Callable[..., AttentionProblem]:
    """`describe` that also looks at addresses and strides: no plan may depend on them."""

    @functools.wraps(describe)
    def described(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **features: Any):  # type: ignore[no-untyped-def]
        problem = describe(q, k, v, *rest, **features)
        return replace(problem, misfit=descriptors.misfit(q=q, k=k, v=v))

    return described


# --- checks: the only place of the op that raises for what the caller got wrong -------------------


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    **features: Any,
) -> tuple[Settings, Extras]:
    """Settings and extras of a call of `attention`, whose dimensions are then known to fit."""
    given = Features(**features)
    check_tensors(q, k, v, ("batch", "seqlen"), one_batch=True)
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if given.document_ids is not None:
        _check_documents(given.document_ids, (batch, seqlen_q), (batch, seqlen_k), q.device)
    found = check_features(q, batch, seqlen_q, seqlen_k, given)
    if given.key_lengths is not None:
        check_index("key_lengths", given.key_lengths, ("batch", batch), q.device)
    return found


def check_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    **features: Any,
) -> tuple[Settings, Extras]:
    """Settings and extras of a call of `attention_varlen`."""
    given = Features(**features)
    check_tensors(q, k, v, ("total",))
    longest = []
    for side, cu, used, maximum, x in (
        ("q", cu_seqlens_q, seqused_q, max_seqlen_q, q),
        ("k", cu_seqlens_k, seqused_k, max_seqlen_k, k),
    ):
        check_index(f"cu_seqlens_{side}", cu, ("batch + 1", None), q.device)
        if cu.shape != cu_seqlens_q.shape:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have one length, batch + 1; "
                f"got {cu_seqlens_q.shape[0]} and {cu.shape[0]}"
            )
        if cu.shape[0] < 1:
            raise ValueError(f"cu_seqlens_{side} must have batch + 1 elements; it is empty")
        if used is not None:
            check_index(f"seqused_{side}", used, ("batch", cu.shape[0] - 1), q.device)
        if maximum is not None and (not isinstance(maximum, (int, torch.SymInt)) or maximum < 0):
            raise ValueError(f"max_seqlen_{side} must be an int of at least 0; got {maximum!r}")
        found = None
        if values_are_checked(cu):
            found = _check_cu_seqlens(side, cu, used, maximum, x.shape[0])
        if maximum is None:
            if found is None:
                if not (torch.compiler.is_compiling() or modes.readable(cu)):
                    raise ValueError(
                        f"max_seqlen_{side} must be given where cu_seqlens_{side} cannot be read: "
                        "under vmap, with fake tensors, and while calls are traced"
                    )
                found = int(cu.diff().max()) if cu.shape[0] > 1 else 0
                if torch.compiler.is_compiling():  # for the backends that ask for a limit
                    torch._check(found >= 0)
                    torch._check(found <= MAX_TRACED_SEQLEN)
            maximum = found
        longest.append(maximum)
    if given.document_ids is not None:
        _check_documents(given.document_ids, (q.shape[0],), (k.shape[0],), q.device)
    settings, extras = check_features(q, cu_seqlens_q.shape[0] - 1, longest[0], longest[1], given)
    settings = settings._replace(max_seqlen_q=longest[0], max_seqlen_k=longest[1])
    return settings, extras._replace(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
    )


def check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    leading: tuple[str, ...],
    names: tuple[str, str, str] = ("q", "k", "v"),
    one_batch: bool = False,
    stored: tuple[torch.dtype, ...] = (),
) -> None:
    """Dimensions, dtypes and devices of q, k and v; their leading dimensions are called so.

    `one_batch`: k and v have q's. `stored`: dtypes that k and v may have instead of q's.
    """
    dims = (*leading, "heads", "head_dim")
    together = f"{names[0]}, {names[1]} and {names[2]}"
    for name, tensor in zip(names, (q, k, v)):
        check_dense(name, tensor, VARLEN)
        if tensor.dim() != len(dims):
            raise ValueError(
                f"{name} must have {len(dims)} dimensions ({', '.join(dims)}); "
                f"got shape {tuple(tensor.shape)}"
            )
        dtypes = DTYPES if tensor is q else DTYPES + stored
        if tensor.dtype not in dtypes:
            accepted = ", ".join(map(dtype_name, dtypes))
            raise TypeError(f"{name} must have one of the dtypes {accepted}; got {tensor.dtype}")
        if tensor.dtype != q.dtype and tensor.dtype not in stored:
            raise TypeError(
                f"{together} must have one dtype; got q {q.dtype}, {name} {tensor.dtype}: "
                "cast them to the same"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"{together} must be on one device; got q on {q.device}, {name} on {tensor.device}"
            )
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    if k.shape[-1] != head_dim:
        raise ValueError(
            f"{names[1]} must have q's head_dim {head_dim}; got shape {tuple(k.shape)}"
        )
    if one_batch and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}; got shape {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{names[2]} must have {names[1]}'s shape {tuple(k.shape)} but for its head_dim; "
            f"got {tuple(v.shape)}"
        )
    if head_dim == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"head_dim must be at least 1; got q of shape {tuple(q.shape)}, v {tuple(v.shape)}"
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"the heads of q must be at least 1 and a multiple of the heads of {names[1]} and "
            f"{names[2]}; got {heads} and {kv_heads}"
        )


def check_features(
    q: torch.Tensor, batch: int, seqlen_q: int, seqlen_k: int, given: Features
) -> tuple[Settings, Extras]:
    """What all calls have in common; the lengths are those of the longest sequence.

    The callers check `document_ids`, and `key_lengths` where they have it.
    """
    heads = q.shape[-2]
    full = (batch, heads, seqlen_q, seqlen_k)
    left, right = _check_window(given.causal, given.window)
    _check_number("softmax_scale", given.softmax_scale, none=True)
    _check_number("softcap", given.softcap)
    if given.softcap < 0:
        raise ValueError(f"softcap must be 0 (off) or positive; got {given.softcap}")
    _check_number("dropout_p", given.dropout_p)
    if not 0.0 <= given.dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1); got {given.dropout_p}")
    if given.fp32_precision not in FP32_PRECISIONS:
        accepted = " or ".join(map(repr, FP32_PRECISIONS))
        raise ValueError(f"fp32_precision must be {accepted}; got {given.fp32_precision!r}")
    if not isinstance(given.deterministic, bool):
        raise TypeError(f"deterministic must be True or False; got {given.deterministic!r}")
    if given.mask is not None:
        _check_broadcastable("mask", given.mask, full, q.device)
        if given.mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be boolean, True where a key may be seen; got {given.mask.dtype}"
            )
    if given.bias is not None:
        _check_broadcastable("bias", given.bias, full, q.device)
        _check_dtype("bias", given.bias, q.dtype)
    if given.alibi_slopes is not None:
        _check_slopes(given.alibi_slopes, batch, heads, q.device)
    if given.sink is not None:
        _check_sink(given.sink, heads, q)
    blocks = given.block_mask
    if blocks is not None:
        _check_block_mask(blocks, given.window, full, q.device)
    scale = given.softmax_scale
    settings = Settings(
        window_left=left,
        window_right=right,
        top_left=isinstance(given.causal, str) and given.causal == "top_left",
        softmax_scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        softcap=float(given.softcap),
        dropout_p=float(given.dropout_p),
        fp32_precision=given.fp32_precision,
        block_q=blocks.block_size[0] if blocks is not None else 0,
        block_k=blocks.block_size[1] if blocks is not None else 0,
        deterministic=given.deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    return settings, gather(q.dtype, *given.tensors)


def gather(
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    document_ids: Documents | None = None,
    block_mask: BlockMask | None = None,
) -> Extras:
    """`Features.tensors` in the one form that backends read. Nothing is checked."""
    if mask is not None:
        mask = _four_dimensional(mask)
    if bias is not None:
        bias = _four_dimensional(bias)
    if alibi_slopes is not None:
        alibi_slopes = torch.atleast_2d(alibi_slopes).to(modes.at_least_float32(dtype))
    q_documents, k_documents = (
        document_ids if isinstance(document_ids, (tuple, list)) else (document_ids, document_ids)
    )
    blocks = None if block_mask is None else block_mask.tensors
    return Extras(mask, bias, alibi_slopes, sink, key_lengths, q_documents, k_documents, blocks)


def _four_dimensional(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _check_window(causal: Causal, window: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) of the band that a query sees, -1 for no bound."""
    given: Any = causal  # whatever equals True is True: a number of numpy too
    flag = isinstance(given, (numbers.Integral, numpy.bool_))
    if given not in ((True, False) if flag else ("bottom_right", "top_left")):
        raise (TypeError if not isinstance(given, str) else ValueError)(
            "causal must be True (which is 'bottom_right'), 'bottom_right', 'top_left' or False; "
            f"got {causal!r}"
        )
    left: Any = UNBOUNDED
    right: Any = UNBOUNDED
    if window is not None:
        sides: tuple[Any, ...] = tuple(window) if isinstance(window, (tuple, list)) else ()
        if len(sides) != 2 or any(
            not isinstance(n, (numbers.Integral, torch.SymInt)) or n < UNBOUNDED for n in sides
        ):
            raise ValueError(
                "window must be (left, right), the keys seen on each side of the diagonal, each an "
                f"int of at least 0, or -1 for no bound; got {window!r}"
            )
        left, right = (n if isinstance(n, torch.SymInt) else int(n) for n in sides)
    return left, 0 if causal else right


def _check_number(name: str, value: Any, none: bool = False) -> None:
    if value is None and none:
        return
    if not isinstance(value, (int, float, numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a float; got {type(value).__name__}")
    # Not math.isfinite: under torch.compile(dynamic=True) a module's float is symbolic.
    number: Any = value
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite; got {value}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    check_dense(name, tensor, VARLEN)
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device {device}; got {tensor.device}")


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype not in (torch.float32, dtype):
        raise TypeError(f"{name} must be float32 or have q's dtype {dtype}; got {tensor.dtype}")


def _check_broadcastable(
    name: str, tensor: torch.Tensor, full: tuple[int, ...], device: torch.device
) -> None:
    check_device(name, tensor, device)
    fits = 1 <= tensor.dim() <= 4
    if not fits or any(n not in (1, f) for n, f in zip(tensor.shape[::-1], full[::-1])):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, seqlen_q, seqlen_k) = {tuple(full)}, "
            f"every dimension whole, 1, or absent on the left; got {tuple(tensor.shape)}"
        )


def _check_slopes(slopes: torch.Tensor, batch: int, heads: int, device: torch.device) -> None:
    check_device("alibi_slopes", slopes, device)
    if not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be float32; got {slopes.dtype}")
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have the shape (heads,) = ({heads},) or (batch, heads) = "
            f"({batch}, {heads}); got {tuple(slopes.shape)}"
        )


def _check_sink(sink: torch.Tensor, heads: int, q: torch.Tensor) -> None:
    check_device("sink", sink, q.device)
    _check_dtype("sink", sink, q.dtype)
    if tuple(sink.shape) != (heads,):
        raise ValueError(f"sink must have the shape (heads,) = ({heads},); got {tuple(sink.shape)}")


def check_index(
    name: str, tensor: torch.Tensor, length: tuple[str, int | None], device: torch.device
) -> None:
    """A vector of integers, of the named length."""
    check_device(name, tensor, device)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64; got {tensor.dtype}")
    called, n = length
    if tensor.dim() != 1 or (n is not None and tensor.shape[0] != n):
        wanted = f"({called},)" if n is None else f"({called},) = ({n},)"
        raise ValueError(f"{name} must have the shape {wanted}; got {tuple(tensor.shape)}")


def check_block_table(table: torch.Tensor, batch: int, device: torch.device) -> None:
    check_device("block_table", table, device)
    if table.dtype not in INDEX_DTYPES:
        raise TypeError(f"block_table must be int32 or int64; got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(
            f"block_table must have the shape (batch, pages of a sequence) = ({batch}, ...); "
            f"got {tuple(table.shape)}"
        )


def _check_documents(
    documents: Documents, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: torch.device
) -> None:
    if isinstance(documents, torch.Tensor):
        if q_shape != k_shape:
            raise ValueError(
                "document_ids must be a pair (ids of the queries, ids of the keys) where their "
                f"lengths differ: queries {q_shape}, keys {k_shape}"
            )
        documents = (documents, documents)
    if not isinstance(documents, (tuple, list)) or len(documents) != 2:
        raise TypeError(
            "document_ids must be a tensor or a pair of tensors (queries, keys); "
            f"got {type(documents).__name__}"
        )
    for side, ids, shape in zip("qk", documents, (q_shape, k_shape)):
        name = f"document_ids (of {side})"
        check_device(name, ids, device)
        if ids.dtype not in INDEX_DTYPES:
            raise TypeError(f"{name} must be int32 or int64; got {ids.dtype}")
        if tuple(ids.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have a number for every token, shape {tuple(shape)}; "
                f"got {tuple(ids.shape)}"
            )


def _check_block_mask(
    block_mask: BlockMask,
    window: tuple[int, int] | None,
    full: tuple[int, ...],
    device: torch.device,
) -> None:
    given: Any = block_mask
    if not isinstance(given, BlockMask):
        kind = type(given).__name__
        if hasattr(given, "mask_mod"):  # of the same name
            kind = (
                f"FlexAttention's, {type(given).__module__}.{kind}: make fastattn's of the same "
                "rule, fastattn.BlockMask.from_predicate(block_mask.mask_mod, *block_mask.shape)"
            )
        raise TypeError(f"block_mask must be a BlockMask; got {kind}")
    if window is not None:
        raise ValueError(
            "window and block_mask both say which tiles exist: give one, and put the window into "
            "the block mask's predicate, e.g. lambda b, h, i, j: (i - j < left) & ..."
        )
    if block_mask.device != device:
        raise ValueError(f"block_mask must be on q's device {device}; got {block_mask.device}")
    batch, heads, seqlen_q, seqlen_k = full
    b, h, rows = block_mask.offsets.shape
    block_q, block_k = block_mask.block_size
    fits = b in (1, batch) and h in (1, heads)
    if not fits or (rows - 1, block_mask.tiles_k) != (
        -(-seqlen_q // block_q),
        -(-seqlen_k // block_k),
    ):
        raise ValueError(
            f"block_mask must be made for (batch or 1, heads or 1, seqlen_q, seqlen_k) = {full}; "
            f"it has batch {b}, heads {h} and {rows - 1} x {block_mask.tiles_k} tiles of "
            f"{block_q} x {block_k}"
        )
    if block_mask.seqlens not in (None, (seqlen_q, seqlen_k)):
        raise ValueError(
            f"block_mask was made for (seqlen_q, seqlen_k) = {block_mask.seqlens}; this call has "
            f"{(seqlen_q, seqlen_k)}: make one for these lengths"
        )


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Whether the contents of an index tensor are looked at: on a GPU that waits for the device."""
    return modes.readable(tensor) and (
        tensor.is_cpu or (tensor.is_cuda and os.environ.get("FASTATTN_CHECK") == "1")
    )


def _check_cu_seqlens(
    side: str, cu: torch.Tensor, used: torch.Tensor | None, maximum: int | None, total: int
) -> int:
    """The longest sequence; raises for contents that point outside of the tensor."""
    name = f"cu_seqlens_{side}"
    starts = cu.tolist()
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0; it starts at {starts[0]}")
    for b, n in enumerate(lengths):
        if n < 0:
            raise ValueError(
                f"{name} must not decrease; it falls from {starts[b]} to {starts[b + 1]} at "
                f"sequence {b}"
            )
    if starts[-1] > total:
        raise ValueError(
            f"{name} must end within the {total} tokens of {side}; it ends at {starts[-1]}"
        )
    if used is not None:
        for b, (n, whole) in enumerate(zip(used.tolist(), lengths)):
            if not 0 <= n <= whole:
                raise ValueError(
                    f"seqused_{side}[{b}] must lie in [0, {whole}], the length of its sequence; "
                    f"got {n}"
                )
    longest = max(lengths, default=0)
    if maximum is not None and maximum < longest:
        raise ValueError(
            f"max_seqlen_{side} must be at least the longest sequence, {longest}; got {maximum}"
        )
    return longest
