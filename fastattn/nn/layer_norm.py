"""Layer normalisation as a module."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastattn.nn.normalized_shape import check_shapes, fold, unfold
from fastattn.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastattn.layer_norm`, with the residual addition fused.

    Constructor, initial values, ``state_dict`` and ``repr`` are torch's. Nothing is kept on the
    instance that torch does not keep, so ``module.__class__ = fastattn.nn.LayerNorm`` turns an
    existing layer into this one, and the reverse turns it back.

    ``forward(input)`` normalises the last dimensions of ``input`` (..., *normalized_shape) and
    returns a tensor like it. ``forward(input, residual)`` normalises the sum, and returns both:

        residual = input + residual
        return layer_norm(residual), residual

    A nested tensor is left to torch's own code.

    Raises ValueError if the last dimensions of ``input`` are not ``normalized_shape``, or if
    ``residual`` has another shape than ``input``.
    """

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if input.is_nested:
            stream = input if residual is None else input + residual
            out = super().forward(stream)
            return out if residual is None else (out, stream)
        shape = self.normalized_shape
        check_shapes("input", input, residual, shape)
        result = layer_norm(
            fold(input, shape),
            fold(self.weight, shape),
            fold(self.bias, shape),
            self.eps,
            fold(residual, shape),
        )
        return unfold(result, shape)
