"""The `gluon` backend of ffn: kernels for Hopper in Triton's low-level dialect.

All products of the forward (`forward.py`) and of the backward (`backward.py`) run here, with what
follows them in the same kernel: biases, activations, gates, derivatives. They share the main loop
of ops/common/gluon_products.py. float16 and bfloat16, sums in float32, sizes in steps of 8.
"""

from __future__ import annotations

import math

import torch

from fastattn import measured
from fastattn.ops.common import gluon as kernels
from fastattn.ops.ffn.gluon.backward import backward
from fastattn.ops.ffn.gluon.forward import forward
from fastattn.ops.ffn.problem import FFNProblem

__all__ = ["backward", "declined", "forward", "unsupported"]

MAX_SIZE = 2**30  # of a dimension: coordinates are 32-bit


def unsupported(problem: FFNProblem) -> str | None:
    """The reason why the kernels cannot run `problem`, or None."""
    if (reason := kernels.unavailable(problem.device)) is not None:
        return reason
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the Gluon kernels compute in float16 and bfloat16, not in {problem.dtype}"
    features = problem.in_features, problem.hidden, problem.out_features
    sizes = math.prod(problem.x_shape[:-1]), *features
    if 0 in sizes:
        return "TMA has no descriptor of an empty tensor"
    if any(size % 8 for size in features):
        return (
            "TMA copies 16 bytes at least: the Gluon kernels need in_features, hidden and "
            "out_features in steps of 8, and they are {}, {} and {}".format(*features)
        )
    if max(sizes) > MAX_SIZE:
        return f"a dimension of {max(sizes)} is above 2^30"
    return None


def declined(problem: FFNProblem) -> str | None:
    """The reason why the automatic choice passes the kernels over, until they are measured."""
    if measured.found("gluon", problem):
        return None
    return (
        "a tile of 192 tokens is too much for a few, and it is not measured where it pays: name "
        "backend='gluon' to use it"
    )
