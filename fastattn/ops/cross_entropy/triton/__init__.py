"""The `triton` backend of cross_entropy.

    forward     losses and, for each row, (m, T) of rows.py: the logits are read once
    backward    dlogits from the logits and (m, T): read once, written once

Any number of classes; float16, bfloat16 and float32, all sums in float32. No atomics. A program
takes whole rows of the forward, so a row's bits do not depend on its batch. Another number of rows
compiles nothing new.
"""

from __future__ import annotations

from fastattn.ops.common import triton as of_kernels
from fastattn.ops.cross_entropy.problem import LossProblem
from fastattn.ops.cross_entropy.triton.kernels import kernel_backward, kernel_forward

__all__ = ["kernel_backward", "kernel_forward", "unsupported"]


def unsupported(problem: LossProblem) -> str | None:
    return of_kernels.unsupported(problem, products=False)
