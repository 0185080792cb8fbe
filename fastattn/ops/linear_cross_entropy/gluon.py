"""The `gluon` backend of linear_cross_entropy: the forward whose logits are never in memory.

    each tile: logits = x weight^T + bias, and of each row the maximum m of the tile's classes,
    T = the sum of exp(logits - m), the target's logit                                   kernel
    the parts of a row joined, in their order, its loss                          Triton's kernel

The main loop is that of ops/common/gluon_products.py: 192 rows by 256 classes. Three numbers of a
row and tile reach memory, 2 % of the logits' bytes. float16 and bfloat16; logits are not rounded.

The backward is the Triton kernels', from the statistics of the forward. Where one number is the
result and its gradients are wanted, the forward makes these too, by ATen's products: that is the
`triton` backend, and this one declines.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn import measured
from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products as products
from fastattn.ops.common.gluon_products import (
    HALF,
    REGISTERS,
    REGISTERS_OF_PRODUCER,
    ROWS,
    Kind,
    Operands,
    Walk,
    accumulator,
    biased,
    corner,
    leave,
    make_ring,
    multiply,
    produce,
)
from fastattn.ops.common.matrices import as_rows
from fastattn.ops.common.triton.activations import LOG2_E
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.cross_entropy.triton.kernels import as_float32
from fastattn.ops.linear_cross_entropy.problem import LinearLossProblem
from fastattn.ops.linear_cross_entropy.triton import join_parts

MAX_SIZE = 2**30  # of a dimension: coordinates are 32-bit


def unsupported(problem: LinearLossProblem) -> str | None:
    """The reason why the kernel cannot run `problem`, or None."""
    if (reason := kernels.unavailable(problem.device)) is not None:
        return reason
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the Gluon kernel computes in float16 and bfloat16, not in {problem.dtype}"
    options = problem.options
    if problem.needs_grad and options.reduction != "none":
        return "gradients of one number are made in the forward, by ATen's products: see triton"
    if options.label_smoothing or options.softcap:
        return "the Gluon kernel has no label_smoothing and no softcap"
    sizes = math.prod(problem.x_shape[:-1]), problem.x_shape[-1], problem.classes
    if 0 in sizes:
        return "TMA has no descriptor of an empty tensor"
    if sizes[1] % 8:
        return f"TMA copies 16 bytes at least: D must be in steps of 8, and it is {sizes[1]}"
    if max(sizes) > MAX_SIZE:
        return f"a dimension of {max(sizes)} is above 2^30"
    return None


def declined(problem: LinearLossProblem) -> str | None:
    """The reason why the automatic choice passes the kernel over, until it is measured."""
    if measured.found("gluon", problem):
        return None
    return "it is not measured where it pays: name backend='gluon' to use it"


def backward_unsupported(problem: LinearLossProblem) -> str:
    """The reason why another kernel runs the backward of a forward that ran here."""
    return "the Gluon backend of linear_cross_entropy has no backward"


# --- kernel ---------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What finishes a tile."""

    bias: Any
    targets: Any
    parts: Any
    rows: Any
    classes: Any
    logit_scale: Any  # None: 1


@gluon.jit
def base(m):
    """What is subtracted from logits whose maximum is m."""
    return gl.where(m == -float("inf"), 0.0, m)


@gluon.jit
def state(acc, target, column, given, BIASED: gl.constexpr):
    """Of each row of a half: m, T and the target's logit."""
    logits = biased(acc, given.bias, column, given.classes, BIASED)
    if given.logit_scale is not None:
        logits *= given.logit_scale
    columns = (column + gl.arange(0, HALF, gl.SliceLayout(0, accumulator(gl.num_ctas()))))[None, :]
    picked = gl.sum(gl.where(columns == target[:, None], logits, 0.0), 1)
    logits = gl.where(columns < given.classes, logits, -float("inf"))
    m = gl.max(logits, 1)
    total = gl.sum(gl.exp2((logits - base(m)[:, None]) * LOG2_E), 1)
    return m, total, picked


@gluon.jit
def finish(first, second, row, column, given, BIASED: gl.constexpr):
    """Store the part of a consumer's rows; parts are of tiles of classes, one below the other."""
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(gl.num_ctas()))
    rows = row + gl.arange(0, ROWS * gl.num_ctas(), layout)
    present = rows < given.rows
    target = gl.load(given.targets + rows, mask=present, other=-1).to(gl.int32)
    m, total, picked = state(first, target, column, given, BIASED)
    other_m, other_total, other_picked = state(second, target, column + HALF, given, BIASED)
    larger = gl.maximum(m, other_m)
    total *= gl.exp2((m - base(larger)) * LOG2_E)
    total += other_total * gl.exp2((other_m - base(larger)) * LOG2_E)
    at = (column // (2 * HALF)).to(gl.int64) * given.rows + rows
    step = gl.cdiv(given.classes, 2 * HALF).to(gl.int64) * given.rows
    gl.store(given.parts + at, larger, mask=present)
    gl.store(given.parts + step + at, total, mask=present)
    gl.store(given.parts + 2 * step + at, picked + other_picked, mask=present)


@gluon.jit
def consume(given, walk, ring, kind: gl.constexpr, BIASED: gl.constexpr, WHICH: gl.constexpr):
    slot = walk.trips * 0
    phase = slot
    for tile in range(gl.program_id(0), walk.rows * walk.columns, gl.num_programs(0)):
        row, column = corner(tile, walk, kind)
        row += WHICH * ROWS * gl.num_ctas()
        first, second, slot, phase = multiply(walk, ring, slot, phase, kind, WHICH)
        finish(first, second, row, column, given, BIASED)


@gluon.jit(do_not_specialize=["rows"])
def linear_loss_forward(
    parts_ptr,  # (3, tiles of classes, rows), float32: m, T, the target's logit
    bias_ptr,  # (classes,); no matter unless BIASED
    targets_ptr,  # (rows,)
    x_desc,  # of (rows, features), or the transpose unless X
    weight_desc,  # of (classes, features), or the transpose unless WEIGHT
    tile_rows,
    tile_columns,
    rows,
    classes,
    trips,
    logit_scale,
    X: gl.constexpr,
    WEIGHT: gl.constexpr,
    BIASED: gl.constexpr,
):
    kind: gl.constexpr = Kind(X, WEIGHT, WEIGHT, False, False)
    operands = Operands(x_desc, weight_desc, weight_desc)
    given = Rows(bias_ptr, targets_ptr, parts_ptr, rows, classes, logit_scale)
    walk = Walk(tile_rows, tile_columns, classes, trips, 0)
    ring = make_ring(operands)
    gl.warp_specialize(
        [
            (consume, (given, walk, ring, kind, BIASED, 0)),
            (consume, (given, walk, ring, kind, BIASED, 1)),
            (consume, (given, walk, ring, kind, BIASED, 2)),
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
    logit_scale: float,
) -> torch.Tensor:
    """The parts (3, tiles of classes, rows)."""
    classes = weight.shape[0]
    cluster = products.programs(len(rows), classes, rows.device)
    x_desc, x_lies = products.operand(rows, ROWS.value, cluster=cluster)
    weight_desc, weight_lies = products.operand(weight, HALF.value, cluster=cluster)
    tiles = products.tiles(len(rows), classes, cluster=cluster)
    parts = rows.new_empty((3, tiles[1], len(rows)), dtype=torch.float32)
    kernels.launch(
        linear_loss_forward,
        products.grid(*tiles, rows.device, cluster),
        parts,
        parts if bias is None else bias.contiguous(),  # no kernel reads the stand-in
        targets, x_desc, weight_desc, *tiles, len(rows), classes,
        products.trips(rows.shape[1]), None if logit_scale == 1.0 else float(logit_scale),
        X=x_lies, WEIGHT=weight_lies, BIASED=bias is not None, num_ctas=cluster,
    )  # fmt: skip
    return parts


def kernel_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    options: Options,
    keep: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, tuple[None, None, None]]:
    """losses (...) and the statistics (2, ...) that a backward takes, in float32."""
    assert not any(keep), "unsupported has said so"
    targets = targets.contiguous()
    parts = launch_forward(as_rows(x), weight, bias, targets, options.logit_scale)
    losses = x.new_empty(targets.shape, dtype=torch.float32)
    statistics = x.new_empty((2, *targets.shape), dtype=torch.float32)
    weights, classes = as_float32(class_weight), weight.shape[0]
    join_parts(parts, targets, weights, losses, statistics, classes, options)
    return losses, statistics, (None, None, None)
