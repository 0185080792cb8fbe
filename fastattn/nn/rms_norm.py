"""Root-mean-square normalisation as a module."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastattn.nn.normalized_shape import check_shapes, fold, unfold
from fastattn.ops.layer_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastattn.rms_norm`, with the residual addition fused.

    Constructor, initial values, ``state_dict`` and ``repr`` are torch's. Nothing is kept on the
    instance that torch does not keep, so ``module.__class__ = fastattn.nn.RMSNorm`` turns an
    existing layer into this one, and the reverse turns it back.

    ``forward(x)`` normalises the last dimensions of ``x`` (..., *normalized_shape) and returns a
    tensor like it. ``forward(x, residual)`` normalises the sum, and returns both:

        residual = x + residual
        return rms_norm(residual), residual

    A nested tensor is left to torch's own code.

    Raises ValueError if the last dimensions of ``x`` are not ``normalized_shape``, or if
    ``residual`` has another shape than ``x``.
    """

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if x.is_nested:
            stream = x if residual is None else x + residual
            out = super().forward(stream)
            return out if residual is None else (out, stream)
        shape = self.normalized_shape
        check_shapes("x", x, residual, shape)
        result = rms_norm(fold(x, shape), fold(self.weight, shape), self.eps, fold(residual, shape))
        return unfold(result, shape)
