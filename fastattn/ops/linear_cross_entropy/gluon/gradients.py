"""The products of chunks of rows, on Hopper."""

from __future__ import annotations

import torch

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products as products
from fastattn.ops.linear_cross_entropy.gradients import Gradients


class OnHopper(Gradients):
    """`Gradients` whose products are those of ops/common/gluon_products.py.

    A matrix that TMA can read in neither order is copied once for all chunks.
    """

    def __init__(
        self, rows: torch.Tensor, weight: torch.Tensor, needs: tuple[bool, bool, bool]
    ) -> None:
        super().__init__(_readable(rows), _readable(weight), needs)

    def empty_logits(self, rows: int) -> torch.Tensor:
        """(rows, V); rows begin at multiples of 16 bytes, as TMA writes them."""
        step = kernels.ALIGNMENT // self.weight.element_size()
        classes = len(self.weight)
        return self.weight.new_empty(rows, -(-classes // step) * step)[:, :classes]

    def multiply(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = left.new_empty(left.shape[0], right.shape[1])
        products.product(out, left, right)
        return out

    def logits(self, rows: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        products.product(out, rows, self.weight.t(), bias)


def _readable(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if kernels.reads(matrix.t()) else kernels.readable(matrix)
