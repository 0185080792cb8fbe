"""The forward whose logits are never in memory.

    each tile: logits = x weight^T + bias, and of each row the maximum m of the tile's scores,
    T = the sum of exp(score - m), the target's score                                   kernel
    the parts of a row joined, in their order, its loss                         Triton's kernel

A tile is 192 rows by 256 classes. Three numbers of a row and tile reach memory, 2 % of the logits'
bytes, and with label smoothing five. Logits are not rounded. The tile's end treats 64 classes at a
time, for want of registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products as products
from fastattn.ops.common.gluon_products import (
    HALF,
    REGISTERS,
    REGISTERS_OF_PRODUCER,
    ROWS,
    STRIP,
    Kind,
    Operands,
    Walk,
    accumulator,
    corner,
    leave,
    make_ring,
    multiply,
    produce,
    strips,
)
from fastattn.ops.common.matrices import as_rows
from fastattn.ops.common.triton.activations import LOG2_E
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.cross_entropy.triton.kernels import as_float32, rule_of
from fastattn.ops.cross_entropy.triton.rows import Rule
from fastattn.ops.linear_cross_entropy.gluon.gradients import OnHopper
from fastattn.ops.linear_cross_entropy.gluon.scores import (
    Given,
    known,
    scores,
    smoothing_weights,
)
from fastattn.ops.linear_cross_entropy.triton import join_parts, losses_and_gradients

NEVER = ["rows"]  # specialised


class State(NamedTuple):
    """Of each row, over the classes so far."""

    m: Any  # the maximum of the scores
    total: Any  # the sum of exp(score - m)
    picked: Any  # the target's score
    smooth: Any  # the sum of w_c (score - m); for label smoothing, as the last
    seen: Any  # the sum of w_c


@gluon.jit
def base(m):
    """What is subtracted from scores whose maximum is m."""
    return gl.where(m == -float("inf"), 0.0, m)


@gluon.jit
def add_strip(logits, target, column, found, given):
    """The state of rows with a strip more."""
    columns = column + gl.arange(0, STRIP, gl.SliceLayout(0, accumulator(gl.num_ctas(), STRIP)))
    s, _ = scores(logits, columns, given)
    picked = gl.sum(gl.where(columns[None, :] == target[:, None], s, 0.0), 1) + found.picked
    there = (columns < given.classes)[None, :]
    s = gl.where(there, s, -float("inf"))
    m = gl.maximum(found.m, gl.max(s, 1))
    s -= base(m)[:, None]
    total = found.total * gl.exp2((found.m - base(m)) * LOG2_E) + gl.sum(gl.exp2(s * LOG2_E), 1)
    smooth, seen = found.smooth, found.seen
    if given.rule.share is not None:
        w = smoothing_weights(columns, given)
        smooth += seen * (base(found.m) - base(m))
        smooth += gl.sum(gl.where(there, s * w[None, :], 0.0), 1)
        seen += gl.sum(w, 0)
    return State(m, total, picked, smooth, seen)


@gluon.jit
def finish(first, second, row, column, parts_ptr, given):
    """Store the part of a consumer's rows; parts are of tiles of classes, one below the other."""
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(gl.num_ctas(), STRIP))
    rows = row + gl.arange(0, ROWS * gl.num_ctas(), layout)
    present = rows < given.rows
    target = known(gl.load(given.targets + rows, mask=present, other=-1), given)
    zeros = gl.zeros([ROWS * gl.num_ctas()], gl.float32, layout)
    found = State(zeros - float("inf"), zeros, zeros, zeros, zeros)
    left, right = strips(first)
    found = add_strip(left, target, column, found, given)
    found = add_strip(right, target, column + STRIP, found, given)
    left, right = strips(second)
    found = add_strip(left, target, column + HALF, found, given)
    found = add_strip(right, target, column + HALF + STRIP, found, given)
    at = parts_ptr + (column // (2 * HALF)).to(gl.int64) * given.rows + rows
    step = gl.cdiv(given.classes, 2 * HALF).to(gl.int64) * given.rows
    gl.store(at, found.m, mask=present)
    gl.store(at + step, found.total, mask=present)
    gl.store(at + 2 * step, found.picked, mask=present)
    if given.rule.share is not None:
        gl.store(at + 3 * step, found.smooth, mask=present)
        gl.store(at + 4 * step, found.seen, mask=present)


@gluon.jit
def consume(parts_ptr, given, walk, ring, kind: gl.constexpr, WHICH: gl.constexpr):
    slot = walk.trips * 0
    phase = slot
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        row += WHICH * ROWS * gl.num_ctas()
        first, second, slot, phase = multiply(walk, ring, slot, phase, kind, WHICH)
        finish(first, second, row, column, parts_ptr, given)


@gluon.jit(do_not_specialize=NEVER)
def linear_loss_forward(
    parts_ptr,  # (3, tiles of classes, rows), float32: m, T, the target's score; smoothed (5, ...)
    bias_ptr,  # (classes,), or None
    targets_ptr,  # (rows,)
    class_weight_ptr,  # (classes,), float32, or None
    x_desc,  # of (rows, features), or the transpose unless X
    weight_desc,  # of (classes, features), or the transpose unless WEIGHT
    tile_rows,
    tile_columns,
    rows,
    classes,
    trips,
    logit_scale,
    softcap,
    share,
    X: gl.constexpr,
    WEIGHT: gl.constexpr,
):
    kind: gl.constexpr = Kind(X, WEIGHT, WEIGHT, False, False)
    operands = Operands(x_desc, weight_desc, weight_desc)
    rule = Rule(logit_scale, softcap, None, share, None)
    given = Given(bias_ptr, targets_ptr, class_weight_ptr, rows, classes, rule)
    walk = Walk(tile_rows, tile_columns, classes, trips, 0)
    ring = make_ring(operands)
    gl.warp_specialize(
        [
            (consume, (parts_ptr, given, walk, ring, kind, 0)),
            (consume, (parts_ptr, given, walk, ring, kind, 1)),
            (consume, (parts_ptr, given, walk, ring, kind, 2)),
            (produce, (operands, operands, walk, ring, kind)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS_OF_PRODUCER],
    )
    leave()


def launch_forward(
    rows: torch.Tensor,  # (rows, features)
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,  # as many as rows, contiguous
    class_weight: torch.Tensor | None,  # float32, contiguous
    options: Options,
) -> torch.Tensor:
    """The parts (3, tiles of classes, rows), (5, ...) with label smoothing."""
    classes = weight.shape[0]
    cluster = products.programs(len(rows), classes, rows.device)
    x_desc, x_lies = products.operand(rows, ROWS.value, cluster=cluster)
    weight_desc, weight_lies = products.operand(weight, HALF.value, cluster=cluster)
    tiles = products.tiles(len(rows), classes, cluster=cluster)
    rule = Rule(*rule_of(options, classes))
    smoothed = rule.share is not None
    parts = rows.new_empty((5 if smoothed else 3, tiles[1], len(rows)), dtype=torch.float32)
    kernels.launch(
        linear_loss_forward,
        products.grid(*tiles, rows.device, cluster),
        parts, None if bias is None else bias.contiguous(), targets,
        class_weight if smoothed else None, x_desc, weight_desc, *tiles, len(rows), classes,
        products.trips(rows.shape[1]), rule.logit_scale, rule.softcap, rule.share,
        X=x_lies, WEIGHT=weight_lies, num_ctas=cluster,
    )  # fmt: skip
    return parts


def forward(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,  # (...), as many as rows
    class_weight: torch.Tensor | None,  # float32, contiguous
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """losses (...) and statistics (2, ...)."""
    targets = targets.contiguous()
    losses = rows.new_empty(targets.shape, dtype=torch.float32)
    statistics = rows.new_empty((2, *targets.shape), dtype=torch.float32)
    parts = launch_forward(rows, weight, bias, targets, class_weight, options)
    join_parts(parts, targets, class_weight, losses, statistics, len(weight), options)
    return losses, statistics


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
    rows, class_weight = as_rows(x), as_float32(class_weight)
    if any(keep):
        gradients = OnHopper(rows, weight, keep)
        losses = losses_and_gradients(gradients, bias, targets, class_weight, options)
        return losses, None, gradients.results(x.shape)
    losses, statistics = forward(rows, weight, bias, targets, class_weight, options)
    return losses, statistics, (None, None, None)
