"""Root-mean-square normalisation as a module."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.normalized_shape import check_shapes, fold, unfold
from fastattn.ops.common import modes
from fastattn.ops.layer_norm import rms_norm
from fastattn.ops.layer_norm.problem import check_dropout


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastattn.rms_norm`, dropout and a residual fused.

    Constructor, initial values, ``state_dict`` and ``repr`` are torch's. Nothing is kept on the
    instance that torch does not keep, so ``module.__class__ = fastattn.nn.RMSNorm`` turns an
    existing layer into this one, and the reverse turns it back.

    ``forward(x)`` normalises the last dimensions of ``x`` (..., *normalized_shape) and returns a
    tensor like it. ``forward(x, residual)`` normalises the sum, and returns both:

        residual = dropout(x, dropout_p) + residual
        return rms_norm(residual), residual

    ``dropout_p`` is dropout's probability, 0 by default; it counts in eval mode too.

    A nested tensor is left to torch's own code.

    Raises ValueError if the last dimensions of ``x`` are not ``normalized_shape``, if
    ``residual`` has another shape than ``x``, or if ``dropout_p`` is no probability or comes
    without ``residual``.
    """

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, residual: Tensor, *, dropout_p: float = 0
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if x.is_nested:
            check_dropout(dropout_p, residual)
            stream = x if residual is None else F.dropout(x, dropout_p) + residual
            out = self._nested(stream)
            return out if residual is None else (out, stream)
        shape = self.normalized_shape
        check_shapes("x", x, residual, shape)
        result = rms_norm(
            fold(x, shape),
            fold(self._factor(), shape),
            self.eps,
            fold(residual, shape),
            dropout_p=dropout_p,
        )
        return unfold(result, shape)

    def _factor(self) -> Tensor | None:
        return self.weight

    def _nested(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OffsetRMSNorm(RMSNorm):
    """`RMSNorm` that multiplies by 1 + weight, as Gemma has it; the sum is at least float32.

    New weights are zero.
    """

    def _factor(self) -> Tensor | None:
        weight: Tensor | None = self.weight
        return None if weight is None else weight.to(modes.at_least_float32(weight.dtype)) + 1

    def _nested(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self._factor(), self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the weights to zero."""
        if self.elementwise_affine:
            torch.nn.init.zeros_(self.weight)
