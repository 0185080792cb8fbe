"""The gradients of x, weight and bias from those of the logits, which come in chunks of rows."""

from __future__ import annotations

import torch

from fastattn.ops.common import modes


class Gradients:
    """Sums over chunks: dx in x's dtype, dweight and dbias in float32, for float64 in float64.

    A chunk of 16-bit operands is multiplied into their dtype and then added in float32.
    """

    def __init__(
        self,
        rows: torch.Tensor,  # (N, D), x
        weight: torch.Tensor,  # (V, D)
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.weight = weight
        wide = modes.at_least_float32(rows.dtype)
        self.dx = rows.new_zeros(rows.shape) if needs[0] else None
        self.dweight = weight.new_zeros(weight.shape, dtype=wide) if needs[1] else None
        self.dbias = weight.new_zeros(weight.shape[0], dtype=wide) if needs[2] else None

    def add(self, places: torch.Tensor | slice, rows: torch.Tensor, dlogits: torch.Tensor) -> None:
        """Add what (n, V) gradients of the logits of `rows` (n, D), x at `places`, come to."""
        if self.dx is not None:
            self.dx[places] = dlogits @ self.weight
        if self.dweight is not None and self.dweight.dtype == rows.dtype:
            self.dweight.addmm_(dlogits.t(), rows)
        elif self.dweight is not None:
            self.dweight += dlogits.t() @ rows
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def results(
        self, shape: torch.Size
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dx, dweight, dbias), dx of `shape`; None where it is not needed."""
        return None if self.dx is None else self.dx.view(shape), self.dweight, self.dbias
