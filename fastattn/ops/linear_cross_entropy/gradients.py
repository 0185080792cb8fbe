"""The products of chunks of rows: logits, and from their gradients those of x, weight and bias."""

from __future__ import annotations

import torch

from fastattn.ops.common import modes

# float16 ends at 65504, which the sum over many rows of a frequent class may pass: such sums are
# kept in float32, and the product of a chunk is made this much smaller.
SHRINK = {torch.float16: 2.0**-6}


def dtype_of_sum(dtype: torch.dtype) -> torch.dtype:
    """That of dweight and dbias for parameters of `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


class Gradients:
    """Sums over chunks: dx in x's dtype, dweight and dbias in that of `dtype_of_sum`.

    The products are ATen's; a backend may have its own.

    The first chunk's product is the sum itself; bfloat16 ones become float32 when a second one is
    added. So rows that come at once take no memory beside their results.
    """

    def __init__(
        self,
        rows: torch.Tensor,  # (N, D), x
        weight: torch.Tensor,  # (V, D)
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.rows = rows
        self.weight = weight
        self.needs = needs
        self.dx = rows.new_zeros(rows.shape) if needs[0] else None
        self.dweight: torch.Tensor | None = None
        self.dbias: torch.Tensor | None = None

    def empty_logits(self, rows: int) -> torch.Tensor:
        """Memory for the logits of so many rows, (rows, V)."""
        return self.weight.new_empty(rows, len(self.weight))

    def multiply(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right

    def logits(self, rows: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = rows weight^T + bias."""
        if bias is None:
            torch.mm(rows, self.weight.t(), out=out)
        else:
            torch.addmm(bias, rows, self.weight.t(), out=out)

    def add(self, places: torch.Tensor | slice, rows: torch.Tensor, dlogits: torch.Tensor) -> None:
        """Add what (n, V) gradients of the logits of `rows` (n, D), x at `places`, come to."""
        if self.dx is not None:
            self.dx[places] = self.multiply(dlogits, self.weight)
        if self.needs[1]:
            self._add_weight(rows, dlogits)
        if self.needs[2]:
            dbias = dlogits.sum(0, dtype=modes.at_least_float32(rows.dtype))
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)

    def _add_weight(self, rows: torch.Tensor, dlogits: torch.Tensor) -> None:
        wide = modes.at_least_float32(rows.dtype)
        if self.dweight is not None and wide == rows.dtype:
            self.dweight.addmm_(dlogits.t(), rows)
            return
        shrink = SHRINK.get(rows.dtype)
        if shrink is None:
            product = self.multiply(dlogits.t(), rows)
        else:
            product = torch.addmm(rows.new_zeros(()), dlogits.t(), rows, beta=0.0, alpha=shrink)
        if self.dweight is None:
            self.dweight = product if shrink is None else product.to(wide).div_(shrink)
        else:
            self.dweight = self.dweight.to(wide).add_(product, alpha=1.0 / (shrink or 1.0))

    def results(
        self, shape: torch.Size
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dx, dweight, dbias), dx of `shape`; None where it is not needed."""
        dx = None if self.dx is None else self.dx.view(shape)
        _, weight, bias = self.needs
        return (
            dx,
            self._finished(self.dweight, self.weight.shape) if weight else None,
            self._finished(self.dbias, self.weight.shape[:1]) if bias else None,
        )

    def _finished(self, total: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        dtype = dtype_of_sum(self.weight.dtype)
        if total is None:  # there was no row
            return self.weight.new_zeros(shape, dtype=dtype)
        return total.to(dtype)
