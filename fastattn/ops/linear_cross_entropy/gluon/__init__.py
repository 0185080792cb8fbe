"""The `gluon` backend of linear_cross_entropy: its products on Hopper, forward and backward.

Where one number is the result and its gradients are wanted, the forward makes them too, as the
`triton` backend does: for each chunk of rows

    logits = x weight^T + bias                                                        a product
    losses, (m, T) of the rows; dlogits, in place of the logits    cross_entropy's Triton kernels
    dx = dlogits weight, dweight += dlogits^T x                                  a product each

Elsewhere the logits are never in memory: a forward of its own (`forward.py`), and a backward that
makes them again, turns them into their gradients (`backward.py`), and multiplies as above.

All share the main loop of ops/common/gluon_products.py. float16 and bfloat16, sums in float32, D in
steps of 8, any number of classes. float16's dweight is ATen's product, whose factor keeps it below
65504, and so are the sums over chunks and dbias.
"""

from __future__ import annotations

import math

import torch

from fastattn import measured
from fastattn.ops.common import gluon as kernels
from fastattn.ops.linear_cross_entropy.gluon.backward import kernel_backward
from fastattn.ops.linear_cross_entropy.gluon.forward import kernel_forward
from fastattn.ops.linear_cross_entropy.problem import LinearLossProblem

__all__ = ["declined", "kernel_backward", "kernel_forward", "unsupported"]

MAX_SIZE = 2**30  # of a dimension: coordinates are 32-bit


def unsupported(problem: LinearLossProblem) -> str | None:
    """The reason why the kernels cannot run `problem`, or None."""
    if (reason := kernels.unavailable(problem.device)) is not None:
        return reason
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the Gluon kernels compute in float16 and bfloat16, not in {problem.dtype}"
    sizes = math.prod(problem.x_shape[:-1]), problem.x_shape[-1], problem.classes
    if 0 in sizes:
        return "TMA has no descriptor of an empty tensor"
    if sizes[1] % 8:
        return f"TMA copies 16 bytes at least: D must be in steps of 8, and it is {sizes[1]}"
    if max(sizes) > MAX_SIZE:
        return f"a dimension of {max(sizes)} is above 2^30"
    return None


def declined(problem: LinearLossProblem) -> str | None:
    """The reason why the automatic choice passes the kernels over, until they are measured."""
    if measured.found("gluon", problem):
        return None
    return "it is not measured where it pays: name backend='gluon' to use it"
