"""Scores of a tile's logits inside of Gluon kernels, as cross_entropy/triton/rows.py has them."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn.ops.common.triton.activations import LOG2_E


class Given(NamedTuple):
    """What a tile's end reads besides its products; what a call lacks is None."""

    bias: Any  # (classes,)
    targets: Any  # (rows,)
    class_weight: Any  # (classes,), float32
    rows: Any
    classes: Any
    rule: Any  # cross_entropy's Rule


@gluon.jit
def scores(logits, columns, given):
    """(scores, the derivative of the cap; of no meaning without one) of products in float32.

    tanh(x) = 1 - u with u = 2 / (e^2x + 1), and its derivative is u (2 - u).
    """
    if given.bias is not None:
        bias = gl.load(given.bias + columns, mask=columns < given.classes, other=0.0)
        logits += bias.to(gl.float32)[None, :]
    if given.rule.logit_scale is not None:
        logits *= given.rule.logit_scale
    slope = logits
    if given.rule.softcap is not None:
        u = 2.0 / (gl.exp2(logits * (2.0 * LOG2_E / given.rule.softcap)) + 1.0)
        logits = given.rule.softcap - given.rule.softcap * u
        slope = u * (2.0 - u)
    return logits, slope


@gluon.jit
def smoothing_weights(columns, given):
    """The weights of classes, 1 without weights, 0 of those that are not there."""
    there = columns < given.classes
    if given.class_weight is None:
        return gl.where(there, 1.0, 0.0)
    else:
        return gl.load(given.class_weight + columns, mask=there, other=0.0)


@gluon.jit
def known(target, given):
    """Targets that are classes, -1 for the others."""
    there = (target >= 0) & (target < given.classes)
    return gl.where(there, target, -1).to(gl.int32)
