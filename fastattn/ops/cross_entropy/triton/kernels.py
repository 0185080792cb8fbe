"""The kernels of cross_entropy, each with its launcher under it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.ops.common import launch
from fastattn.ops.cross_entropy import tiles
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.cross_entropy.triton.rows import Rule, add_tile, gradient, loss, scores

NEVER = ["rows", "inner", "ignore_index"]  # specialised


@triton.jit
def _row_offsets(row, outer_stride, inner_stride, inner):
    """Where rows begin; they are evenly spaced in each group of `inner`."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def target_weight(weight_ptr, target, known):
    """The weights of targets, 1 without weights; `known` says which are classes."""
    if weight_ptr is None:
        return tl.where(known, 1.0, 1.0)
    else:
        return tl.load(weight_ptr + target, mask=known, other=0.0)


# --- forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NEVER)
def _forward_kernel(
    logits_ptr,  # (rows, classes)
    targets_ptr,  # (rows,)
    weight_ptr,  # (classes,), float32, or None
    losses_ptr,  # (rows,)
    statistics_ptr,  # (2, rows): m, T
    outer_stride,
    inner_stride,
    inner,
    rows,
    classes,
    ignore_index,
    logit_scale,
    softcap,
    kept,
    share,
    z_loss,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rule = Rule(logit_scale, softcap, kept, share, z_loss)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    logits_ptr += _row_offsets(tl.minimum(row, rows - 1), outer_stride, inner_stride, inner)[
        :, None
    ]
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    smooth, seen = total, total
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = column < classes
        s, _ = scores(tl.load(logits_ptr + column, mask=inside, other=0.0), rule)
        w = 1.0
        if share is not None and weight_ptr is not None:
            w = tl.load(weight_ptr + column, mask=inside, other=0.0)
        s = tl.where(inside, s, -float("inf"))
        m, total, smooth, seen = add_tile(s, w, inside, m, total, smooth, seen, rule)
    target = tl.load(targets_ptr + row, mask=present, other=0).to(tl.int64)
    known = (target >= 0) & (target < classes)
    picked, _ = scores(tl.load(logits_ptr + target[:, None], mask=known[:, None], other=0.0), rule)
    w_t = target_weight(weight_ptr, target, known)
    losses = loss(tl.sum(picked, 1), m, total, smooth, seen, w_t, rule)
    losses = tl.where(known, losses, float("nan"))
    tl.store(losses_ptr + row, tl.where(target == ignore_index, 0.0, losses), mask=present)
    tl.store(statistics_ptr + row, m, mask=present)
    tl.store(statistics_ptr + rows + row, total, mask=present)


def kernel_forward(
    logits: torch.Tensor,  # (..., V)
    targets: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,)
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """losses (...) and statistics (2, ...), float32."""
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    statistics = logits.new_empty((2, *targets.shape), dtype=torch.float32)
    logits, *strides = _as_rows(logits)
    rows, classes = targets.numel(), logits.shape[-1]
    tile = tiles.forward(classes)
    launch.launch(
        _forward_kernel, (triton.cdiv(rows, tile.rows),), logits, targets.contiguous(),
        as_float32(weight), losses, statistics, *strides, rows, classes, options.ignore_index,
        *rule_of(options, classes), ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    return losses, statistics


# --- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NEVER)
def _backward_kernel(
    dlosses_ptr,  # (rows,)
    logits_ptr,  # (rows, classes)
    targets_ptr,  # (rows,)
    weight_ptr,  # (classes,), float32, or None
    all_weight_ptr,  # the sum of the weights, or None
    statistics_ptr,  # (2, rows)
    dlogits_ptr,  # (rows, classes)
    outer_stride,
    inner_stride,
    inner,
    dlogits_stride,  # None: classes
    rows,
    classes,
    ignore_index,
    logit_scale,
    softcap,
    kept,
    share,
    z_loss,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rule = Rule(logit_scale, softcap, kept, share, z_loss)
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    present = row < rows
    inside = column < classes
    logits_ptr += _row_offsets(row, outer_stride, inner_stride, inner)
    logits = tl.load(logits_ptr + column, mask=present & inside, other=0.0)
    s, slope = scores(logits, rule)
    target = tl.load(targets_ptr + row, mask=present, other=0).to(tl.int64)
    known = (target >= 0) & (target < classes)
    w_t = target_weight(weight_ptr, target, known)
    w, all_weight = 1.0, classes * 1.0
    if share is not None and weight_ptr is not None:
        w = tl.load(weight_ptr + column, mask=inside, other=0.0)
        all_weight = tl.load(all_weight_ptr)
    m = tl.load(statistics_ptr + row, mask=present, other=0.0)
    total = tl.load(statistics_ptr + rows + row, mask=present, other=1.0)
    dloss = tl.load(dlosses_ptr + row, mask=present, other=0.0)
    ds = gradient(s, slope, column == target, w, m, total, dloss, w_t, all_weight, rule)
    ds = tl.where(target == ignore_index, 0.0, ds).to(dlogits_ptr.dtype.element_ty)
    stride = classes if dlogits_stride is None else dlogits_stride
    tl.store(dlogits_ptr + row * stride + column, ds, mask=present & inside)


def kernel_backward(
    dlosses: torch.Tensor,  # (...)
    logits: torch.Tensor,  # (..., V)
    targets: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,)
    statistics: torch.Tensor,  # (2, ...)
    options: Options,
    out: torch.Tensor | None = None,  # (rows, V)
) -> torch.Tensor:
    """dlogits, in their shape and dtype; in `out`, which may be the logits themselves.

    A program reads the tile that it writes, and no other.
    """
    dlogits = logits.new_empty(logits.shape) if out is None else out
    logits, *strides = _as_rows(logits)
    rows, classes = targets.numel(), logits.shape[-1]
    tile = tiles.backward(classes)
    weight = as_float32(weight)
    launch.launch(
        _backward_kernel, (triton.cdiv(rows, tile.rows) * triton.cdiv(classes, tile.block),),
        dlosses.contiguous(), logits, targets.contiguous(), weight,
        None if weight is None else weight.sum(), statistics, dlogits, *strides,
        None if out is None or out.is_contiguous() else out.stride(0), rows, classes,
        options.ignore_index, *rule_of(options, classes),
        ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    return dlogits


# --- what the launchers share -------------------------------------------------------------------


def rule_of(options: Options, classes: int) -> tuple[float | None, ...]:
    """The arguments of a kernel that make up a `Rule`."""
    smoothing = options.label_smoothing
    return (
        None if options.logit_scale == 1.0 else float(options.logit_scale),
        float(options.softcap) or None,
        1.0 - smoothing,
        smoothing / classes or None,
        float(options.z_loss) or None,
    )


def as_float32(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()


def _as_rows(logits: torch.Tensor) -> tuple[Any, ...]:
    """(logits, outer stride, inner stride, rows of a group): a copy only if rows have no such form.

    Those of `logits[:, :-1]`, a language model's that are shifted by one, have it.
    """
    if logits.stride(-1) == 1:
        try:
            rows = logits.view(-1, logits.shape[-1])
        except RuntimeError:
            if logits.dim() == 3:
                return logits, *logits.stride()[:2], logits.shape[1]
        else:
            return rows, 0, rows.stride(0), max(1, rows.shape[0])
    rows = logits.contiguous().view(-1, logits.shape[-1])
    return rows, 0, rows.stride(0), max(1, rows.shape[0])
