"""The backward of losses of rows: the logits again, tile by tile, and their gradients.

    for each chunk of rows:
    each tile: logits = x weight^T + bias, and dlogits, stored                          kernel
    dx = dlogits weight, dweight += dlogits^T x                                 a product each

A tile's end treats 64 classes at a time, for want of registers, and stores them by TMA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products as products
from fastattn.ops.common.gluon import tma
from fastattn.ops.common.gluon_products import (
    CONSUMERS,
    HALF,
    REGISTERS,
    REGISTERS_OF_PRODUCER,
    ROWS,
    STRIP,
    Kind,
    Operands,
    Walk,
    accumulator,
    allocate,
    corner,
    leave,
    make_ring,
    multiply,
    produce,
    put,
    strips,
)
from fastattn.ops.common.matrices import as_rows
from fastattn.ops.common.triton.activations import LOG2_E
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.cross_entropy.triton.kernels import as_float32, rule_of
from fastattn.ops.cross_entropy.triton.rows import Rule
from fastattn.ops.linear_cross_entropy import tiles as table
from fastattn.ops.linear_cross_entropy.gluon.forward import forward
from fastattn.ops.linear_cross_entropy.gluon.gradients import OnHopper
from fastattn.ops.linear_cross_entropy.gluon.scores import (
    Given,
    known,
    scores,
    smoothing_weights,
)

NEVER = ["rows", "ignore_index"]  # specialised


class Upstream(NamedTuple):
    """Where what is known of each row lies, and of all classes."""

    statistics: Any  # (2, rows): m, T
    dlosses: Any
    all_weight: Any  # the sum of the class weights, for label smoothing
    ignore_index: Any


class Row(NamedTuple):
    """Numbers of each row, from which its gradients are made."""

    target: Any
    counts: Any
    m: Any
    every: Any  # times exp(score - m): of every class
    hit: Any  # of the target, subtracted
    smooth: Any  # times a class's weight, subtracted


@gluon.jit
def facts(row, given, upstream):
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(gl.num_ctas(), STRIP))
    rows = row + gl.arange(0, ROWS * gl.num_ctas(), layout)
    present = rows < given.rows
    named = gl.load(given.targets + rows, mask=present, other=0).to(gl.int64)
    target = known(named, given)
    m = gl.load(upstream.statistics + rows, mask=present, other=0.0)
    total = gl.load(upstream.statistics + given.rows + rows, mask=present, other=1.0)
    scale = gl.load(upstream.dlosses + rows, mask=present, other=0.0)
    rule = given.rule
    if rule.logit_scale is not None:
        scale *= rule.logit_scale
    hit = gl.zeros([ROWS * gl.num_ctas()], gl.float32, layout) + rule.kept
    if given.class_weight is not None:
        hit *= gl.load(given.class_weight + target, mask=target >= 0, other=0.0)
    every, smooth = hit, scale
    if rule.share is not None:
        smooth = scale * rule.share
        if upstream.all_weight is not None:
            every = hit + rule.share * gl.load(upstream.all_weight)
        else:
            every = hit + rule.share * given.classes
    if rule.z_loss is not None:
        every += 2.0 * rule.z_loss * (m + gl.log(total))
    counts = named != upstream.ignore_index
    return Row(target, counts, m, every * scale / total, hit * scale, smooth)


@gluon.jit
def gradient(logits, column, line, given):
    """The gradient of a strip's logits."""
    columns = column + gl.arange(0, STRIP, gl.SliceLayout(0, accumulator(gl.num_ctas(), STRIP)))
    s, slope = scores(logits, columns, given)
    ds = gl.exp2((s - line.m[:, None]) * LOG2_E) * line.every[:, None]
    ds -= gl.where(columns[None, :] == line.target[:, None], line.hit[:, None], 0.0)
    if given.rule.share is not None:
        ds -= line.smooth[:, None] * smoothing_weights(columns, given)[None, :]
    if given.rule.softcap is not None:
        ds *= slope
    return gl.where(line.counts[:, None], ds, 0.0)


@gluon.jit
def finish(half, row, column, line, given, out_desc, smem):
    left, right = strips(half)
    put(gradient(left, column, line, given), out_desc, row, column, smem)
    column += STRIP
    put(gradient(right, column, line, given), out_desc, row, column, smem)


@gluon.jit
def consume(given, upstream, out_desc, walk, ring, smem, kind: gl.constexpr, WHICH: gl.constexpr):
    slot = walk.trips * 0
    phase = slot
    mine = smem.index(WHICH)
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        row += WHICH * ROWS * gl.num_ctas()
        first, second, slot, phase = multiply(walk, ring, slot, phase, kind, WHICH)
        line = facts(row, given, upstream)
        finish(first, row, column, line, given, out_desc, mine)
        finish(second, row, column + HALF, line, given, out_desc, mine)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=NEVER)
def linear_loss_backward(
    statistics_ptr,  # (2, rows), float32: m, T
    dlosses_ptr,  # (rows,), float32
    bias_ptr,  # (classes,), or None
    targets_ptr,  # (rows,)
    class_weight_ptr,  # (classes,), float32, or None
    all_weight_ptr,  # their sum, for label smoothing, or None
    x_desc,  # of (rows, features), or the transpose unless X
    weight_desc,  # of (classes, features), or the transpose unless WEIGHT
    out_desc,  # of (rows, classes): dlogits
    tile_rows,
    tile_columns,
    rows,
    classes,
    trips,
    ignore_index,
    logit_scale,
    softcap,
    kept,
    share,
    z_loss,
    X: gl.constexpr,
    WEIGHT: gl.constexpr,
):
    kind: gl.constexpr = Kind(X, WEIGHT, WEIGHT, False, False)
    operands = Operands(x_desc, weight_desc, weight_desc)
    rule = Rule(logit_scale, softcap, kept, share, z_loss)
    given = Given(bias_ptr, targets_ptr, class_weight_ptr, rows, classes, rule)
    upstream = Upstream(statistics_ptr, dlosses_ptr, all_weight_ptr, ignore_index)
    walk = Walk(tile_rows, tile_columns, classes, trips, 0)
    ring = make_ring(operands)
    smem = allocate(out_desc, CONSUMERS)
    gl.warp_specialize(
        [
            (consume, (given, upstream, out_desc, walk, ring, smem, kind, 0)),
            (consume, (given, upstream, out_desc, walk, ring, smem, kind, 1)),
            (consume, (given, upstream, out_desc, walk, ring, smem, kind, 2)),
            (produce, (operands, operands, walk, ring, kind)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS_OF_PRODUCER],
    )
    leave()


def launch_gradient(
    out: torch.Tensor,  # (rows, classes)
    dlosses: torch.Tensor,  # (rows,), contiguous, as targets and statistics
    rows: torch.Tensor,  # (rows, features), a chunk
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,  # float32, contiguous
    all_weight: torch.Tensor | None,  # its sum, for label smoothing
    statistics: torch.Tensor,  # (2, rows)
    options: Options,
) -> None:
    """Fill `out` with the gradients of the logits."""
    classes = weight.shape[0]
    cluster = products.programs(len(rows), classes, rows.device)
    x_desc, x_lies = products.operand(rows, ROWS.value, cluster=cluster)
    weight_desc, weight_lies = products.operand(weight, HALF.value, cluster=cluster)
    out_desc = products.result(out, cluster, STRIP.value)
    tiles = products.tiles(len(rows), classes, cluster=cluster)
    kernels.launch(
        linear_loss_backward,
        products.grid(*tiles, rows.device, cluster),
        statistics, dlosses, None if bias is None else bias.contiguous(), targets, class_weight,
        all_weight, x_desc, weight_desc, out_desc, *tiles, len(rows), classes,
        products.trips(rows.shape[1]), options.ignore_index, *rule_of(options, classes),
        X=x_lies, WEIGHT=weight_lies, num_ctas=cluster,
    )  # fmt: skip


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
    rows, classes, class_weight = as_rows(x), len(weight), as_float32(class_weight)
    targets, dlosses = targets.reshape(-1).contiguous(), dlosses.reshape(-1).contiguous()
    if statistics is None:
        _, statistics = forward(rows, weight, bias, targets, class_weight, options)
    all_weight = None
    if class_weight is not None and options.label_smoothing:
        all_weight = class_weight.sum()
    gradients = OnHopper(rows, weight, needs)
    n = len(rows)
    size = table.chunk(2 * CONSUMERS.value * ROWS.value, n, classes)  # tiles of a cluster
    buffer = gradients.empty_logits(size)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        some, dlogits = gradients.rows[part], buffer[: part.stop - start]
        launch_gradient(
            dlogits, dlosses[part], some, gradients.weight, bias, targets[part], class_weight,
            all_weight, statistics.view(2, n)[:, part].contiguous(), options,
        )  # fmt: skip
        gradients.add(part, some, dlogits)
    return gradients.results(x.shape)
