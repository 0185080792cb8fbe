"""The `triton` backend of linear_cross_entropy: no more logits in memory than those of a chunk.

Where one number is the result and its gradients are wanted, the forward makes them too, as those of
the sum, with three products. For each chunk of rows:

    logits = x weight^T + bias                                                             ATen
    losses, (m, T) of the rows; dlogits, in place of the logits          cross_entropy's kernels
    dx = dlogits weight, dweight += dlogits^T x, dbias += sums                             ATen

Elsewhere the forward makes tiles of logits that never leave the chip, and a backward makes them
again, which is a fourth product:

    forward     each program: a tile of rows, a part of the classes, (m, T, ...) of that   kernel
                the parts of a row joined, its loss                                        kernel
    backward    for each chunk of rows: the logits again, tile by tile, and dlogits        kernel
                dx, dweight, dbias as above                                                ATen

The largest thing in memory is a chunk, in x's dtype (tiles.py). The weight's gradient adds up over
the chunks in float32, in a fixed order: no atomics. Any size and any strides of the weight;
float16, bfloat16 and float32. Sums are in float32; the kernels' own products of float32 are IEEE
ones (no TF32), ATen's as the user has set them. Logits of a chunk are rounded to x's dtype, as a
model's head rounds them; tiles are not. Another number of rows compiles nothing new.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.ops.common import launch
from fastattn.ops.common.triton import unsupported
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.cross_entropy.triton import kernels as of_logits
from fastattn.ops.cross_entropy.triton.kernels import as_float32, rule_of, target_weight
from fastattn.ops.cross_entropy.triton.rows import Rule, add_tile, gradient, join, loss, scores
from fastattn.ops.linear_cross_entropy import tiles
from fastattn.ops.linear_cross_entropy.gradients import Gradients

__all__ = ["kernel_backward", "kernel_forward", "unsupported"]

NEVER = ["rows", "splits", "ignore_index"]  # specialised


@triton.jit
def _logits(
    x_ptr,  # (rows, features)
    weight_ptr,  # (classes, features)
    bias_ptr,  # (classes,), or None
    row,  # (BLOCK_M,), all inside
    column,  # (BLOCK_N,), all inside
    stride_x,
    stride_wv,
    stride_wk,
    features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The tile x[row] weight[column]^T + bias[column], in float32."""
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None].to(tl.int64) * stride_x + ks[None, :]
    w_ptrs = weight_ptr + column[None, :].to(tl.int64) * stride_wv
    w_ptrs += ks[:, None].to(tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, features, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            left = ks < features - k
            x = tl.load(x_ptrs, mask=left[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=left[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    return acc


# --- forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*NEVER, "tiles_of_split"])
def _forward_kernel(
    x_ptr,  # (rows, features)
    weight_ptr,  # (classes, features)
    bias_ptr,  # (classes,), or None
    targets_ptr,  # (rows,)
    class_weight_ptr,  # (classes,), float32, or None
    parts_ptr,  # (5, splits, rows): m, T, the target's score, smooth, seen
    stride_x,
    stride_wv,
    stride_wk,
    rows,
    classes,
    features,
    splits,
    tiles_of_split,
    logit_scale,
    softcap,
    kept,
    share,
    z_loss,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Programs that run together have the same part of the classes: it stays in the L2."""
    rule = Rule(logit_scale, softcap, kept, share, z_loss)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    split = tl.program_id(0) // tiles_m
    row = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < rows
    target = tl.load(targets_ptr + row, mask=present, other=0).to(tl.int64)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    picked, smooth, seen = total, total, total
    first = split * tiles_of_split
    for tile in range(first, tl.minimum(first + tiles_of_split, tl.cdiv(classes, BLOCK_N))):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # What is beyond the last row or class is that one again, and not counted.
        logits = _logits(
            x_ptr, weight_ptr, bias_ptr, tl.minimum(row, rows - 1),
            tl.minimum(column, classes - 1), stride_x, stride_wv, stride_wk, features, BLOCK_M,
            BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        inside = (column < classes)[None, :]
        s, _ = scores(logits, rule)
        picked += tl.sum(tl.where((column[None, :] == target[:, None]) & inside, s, 0.0), 1)
        w = 1.0
        if share is not None and class_weight_ptr is not None:
            w = tl.load(class_weight_ptr + column, mask=column < classes, other=0.0)[None, :]
        s = tl.where(inside, s, -float("inf"))
        m, total, smooth, seen = add_tile(s, w, inside, m, total, smooth, seen, rule)
    parts_ptr += split.to(tl.int64) * rows + row
    step = tl.cast(splits, tl.int64) * rows
    tl.store(parts_ptr, m, mask=present)
    tl.store(parts_ptr + step, total, mask=present)
    tl.store(parts_ptr + 2 * step, picked, mask=present)
    if share is not None:
        tl.store(parts_ptr + 3 * step, smooth, mask=present)
        tl.store(parts_ptr + 4 * step, seen, mask=present)


@triton.jit(do_not_specialize=NEVER)
def _join_kernel(
    parts_ptr,  # (5, splits, rows), or (3, ...) without label smoothing
    targets_ptr,  # (rows,)
    class_weight_ptr,  # (classes,), float32, or None
    losses_ptr,  # (rows,)
    statistics_ptr,  # (2, rows): m, T
    rows,
    classes,
    splits,
    ignore_index,
    logit_scale,
    softcap,
    kept,
    share,
    z_loss,
    BLOCK_M: tl.constexpr,
):
    rule = Rule(logit_scale, softcap, kept, share, z_loss)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < rows
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    picked, smooth, seen = total, total, total
    step = tl.cast(splits, tl.int64) * rows
    parts_ptr += row
    for _ in range(splits):
        part_m = tl.load(parts_ptr, mask=present, other=0.0)
        part_total = tl.load(parts_ptr + step, mask=present, other=1.0)
        picked += tl.load(parts_ptr + 2 * step, mask=present, other=0.0)
        part_smooth, part_seen = total, total
        if share is not None:
            part_smooth = tl.load(parts_ptr + 3 * step, mask=present, other=0.0)
            part_seen = tl.load(parts_ptr + 4 * step, mask=present, other=0.0)
        m, total, smooth, seen = join(
            m, total, smooth, seen, part_m, part_total, part_smooth, part_seen, rule
        )
        parts_ptr += rows
    target = tl.load(targets_ptr + row, mask=present, other=0).to(tl.int64)
    known = (target >= 0) & (target < classes)
    w_t = target_weight(class_weight_ptr, target, known)
    losses = tl.where(known, loss(picked, m, total, smooth, seen, w_t, rule), float("nan"))
    tl.store(losses_ptr + row, tl.where(target == ignore_index, 0.0, losses), mask=present)
    tl.store(statistics_ptr + row, m, mask=present)
    tl.store(statistics_ptr + rows + row, total, mask=present)


def kernel_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    options: Options,
    keep: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor | None, ...]]:
    """losses (...), and what a backward takes: statistics (2, ...), or those gradients that `keep`
    asks for, of the losses' sum. Losses and statistics are float32."""
    if any(keep):
        gradients = Gradients(_as_rows(x, targets), weight, keep)
        losses = losses_and_gradients(gradients, bias, targets, class_weight, options)
        return losses, None, gradients.results(x.shape)
    losses, statistics = _losses(x, weight, bias, targets, class_weight, options)
    return losses, statistics, (None, None, None)


def _losses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = x.new_empty(targets.shape, dtype=torch.float32)
    statistics = x.new_empty((2, *targets.shape), dtype=torch.float32)
    rows, classes = _as_rows(x, targets), weight.shape[0]
    n, (tile, constants) = rows.shape[0], _tile(rows, weight)
    splits = tiles.splits(tile, n, classes, launch.multiprocessors(x.device))
    tiles_of_split = triton.cdiv(triton.cdiv(classes, tile.block_n), splits)
    targets, class_weight = targets.contiguous(), as_float32(class_weight)
    parts = losses.new_empty(5, splits, n)
    launch.launch(
        _forward_kernel, (triton.cdiv(n, tile.block_m) * splits,), rows, weight, _flat(bias),
        targets, class_weight, parts, rows.stride(0), *weight.stride(), n, classes,
        weight.shape[1], splits, tiles_of_split, *rule_of(options, classes), **constants,
    )  # fmt: skip
    join_parts(parts, targets, class_weight, losses, statistics, classes, options)
    return losses, statistics


def join_parts(
    parts: torch.Tensor,  # (3, splits, rows): m, T, the target's score; and two for smoothing
    targets: torch.Tensor,  # (...), as many as rows, contiguous
    class_weight: torch.Tensor | None,  # float32
    losses: torch.Tensor,  # (...)
    statistics: torch.Tensor,  # (2, ...)
    classes: int,
    options: Options,
) -> None:
    """Fill the losses, and (m, T) of all classes of a row."""
    _, splits, n = parts.shape
    launch.launch(
        _join_kernel, (triton.cdiv(n, 128),), parts, targets, class_weight, losses, statistics,
        n, classes, splits, options.ignore_index, *rule_of(options, classes), BLOCK_M=128,
        num_warps=4,
    )  # fmt: skip


def losses_and_gradients(
    gradients: Gradients,
    bias: torch.Tensor | None,
    targets: torch.Tensor,  # (...)
    class_weight: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """losses (...); `gradients`, of no chunk yet, get those of their sum."""
    rows, classes = gradients.rows, len(gradients.weight)
    flat, class_weight = targets.reshape(-1), as_float32(class_weight)
    losses = rows.new_empty(len(rows), dtype=torch.float32)
    ones = losses.new_ones(len(rows))
    size = tiles.rows_at_once(len(rows), classes, rows.shape[1], rows.element_size())
    buffer = gradients.empty_logits(size)
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        some, logits = rows[part], buffer[: part.stop - start]
        gradients.logits(some, bias, logits)
        given = logits, flat[part], class_weight
        losses[part], statistics = of_logits.kernel_forward(*given, options)
        of_logits.kernel_backward(ones[part], *given, statistics, options, out=logits)
        gradients.add(part, some, logits)
    return losses.view(targets.shape)


# --- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NEVER)
def _gradient_kernel(
    x_ptr,  # (rows, features), a chunk
    weight_ptr,  # (classes, features)
    bias_ptr,  # (classes,), or None
    targets_ptr,  # (rows,)
    class_weight_ptr,  # (classes,), float32, or None
    all_weight_ptr,  # the sum of the class weights, or None
    m_ptr,  # (rows,)
    total_ptr,  # (rows,)
    dlosses_ptr,  # (rows,)
    dlogits_ptr,  # (rows, classes), contiguous
    stride_x,
    stride_wv,
    stride_wk,
    rows,
    classes,
    features,
    ignore_index,
    logit_scale,
    softcap,
    kept,
    share,
    z_loss,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rule = Rule(logit_scale, softcap, kept, share, z_loss)
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0) // tl.cdiv(classes, BLOCK_N), tl.program_id(0) % tl.cdiv(classes, BLOCK_N),
        tl.cdiv(rows, BLOCK_M), tl.cdiv(classes, BLOCK_N), GROUP_M,
    )  # fmt: skip
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = _logits(
        x_ptr, weight_ptr, bias_ptr, tl.minimum(row, rows - 1), tl.minimum(column, classes - 1),
        stride_x, stride_wv, stride_wk, features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    s, slope = scores(logits, rule)
    row, column = row[:, None], column[None, :]
    present, inside = row < rows, column < classes
    target = tl.load(targets_ptr + row, mask=present, other=0).to(tl.int64)
    known = (target >= 0) & (target < classes)
    w_t = target_weight(class_weight_ptr, target, known)
    w, all_weight = 1.0, classes * 1.0
    if share is not None and class_weight_ptr is not None:
        w = tl.load(class_weight_ptr + column, mask=inside, other=0.0)
        all_weight = tl.load(all_weight_ptr)
    m = tl.load(m_ptr + row, mask=present, other=0.0)
    total = tl.load(total_ptr + row, mask=present, other=1.0)
    dloss = tl.load(dlosses_ptr + row, mask=present, other=0.0)
    ds = gradient(s, slope, column == target, w, m, total, dloss, w_t, all_weight, rule)
    ds = tl.where(target == ignore_index, 0.0, ds).to(dlogits_ptr.dtype.element_ty)
    dlogits_ptr += row.to(tl.int64) * classes + column
    tl.store(dlogits_ptr, ds, mask=present & inside)


def kernel_backward(
    dlosses: torch.Tensor,  # (...)
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    statistics: torch.Tensor | None,  # (2, ...)
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dweight, dbias), None where it is not needed. Without statistics it makes them."""
    if statistics is None:
        _, statistics = _losses(x, weight, bias, targets, class_weight, options)
    rows, classes = _as_rows(x, targets), weight.shape[0]
    n, (tile, constants) = rows.shape[0], _tile(rows, weight)
    targets, dlosses = targets.reshape(-1), dlosses.reshape(-1).contiguous()
    m, total = statistics.view(2, -1)
    class_weight, bias = as_float32(class_weight), _flat(bias)
    all_weight = None if class_weight is None else class_weight.sum()
    gradients = Gradients(rows, weight, needs)
    size = tiles.chunk(tile.block_m, n, classes)
    buffer = gradients.empty_logits(size if n else 0)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        some, dlogits = rows[part], buffer[: part.stop - start]
        programs = triton.cdiv(len(some), tile.block_m) * triton.cdiv(classes, tile.block_n)
        launch.launch(
            _gradient_kernel, (programs,), some, weight, bias, targets[part], class_weight,
            all_weight, m[part], total[part], dlosses[part], dlogits, some.stride(0),
            *weight.stride(), len(some), classes, weight.shape[1], options.ignore_index,
            *rule_of(options, classes), GROUP_M=tile.group_m, **constants,
        )  # fmt: skip
        gradients.add(part, some, dlogits)
    return gradients.results(x.shape)


# --- what the launchers share -------------------------------------------------------------------


def _as_rows(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """x as (rows, features), contiguous in the features; a view where it can be."""
    rows = x.reshape(targets.numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flat(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def _tile(rows: torch.Tensor, weight: torch.Tensor) -> tuple[tiles.Tile, dict[str, Any]]:
    """The tile of rows weight^T, and what it is to a kernel."""
    features = weight.shape[1]
    stride_wv, stride_wk = weight.stride()
    long = stride_wv if stride_wk == 1 else stride_wk if stride_wv == 1 else 1
    aligned = (features | rows.stride(0) | long) % 16 == 0
    tile = tiles.tile(rows.element_size(), aligned)
    return tile, {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN_K": features % tile.block_k == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
