"""Layer normalisation as a module."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.normalized_shape import check_shapes, fold, unfold
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.layer_norm.problem import check_dropout


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastattn.layer_norm`, dropout and a residual fused.

    Constructor, initial values, ``state_dict`` and ``repr`` are torch's. Nothing is kept on the
    instance that torch does not keep, so ``module.__class__ = fastattn.nn.LayerNorm`` turns an
    existing layer into this one, and the reverse turns it back.

    ``forward(input)`` normalises the last dimensions of ``input`` (..., *normalized_shape) and
    returns a tensor like it. ``forward(input, residual)`` normalises the sum, and returns both:

        residual = dropout(input, dropout_p) + residual
        return layer_norm(residual), residual

    ``dropout_p`` is dropout's probability, 0 by default; it counts in eval mode too.

    A nested tensor is left to torch's own code.

    Raises ValueError if the last dimensions of ``input`` are not ``normalized_shape``, if
    ``residual`` has another shape than ``input``, or if ``dropout_p`` is no probability or comes
    without ``residual``.
    """

    @overload
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(
        self, input: Tensor, residual: Tensor, *, dropout_p: float = 0
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if input.is_nested:
            check_dropout(dropout_p, residual)
            stream = input if residual is None else F.dropout(input, dropout_p) + residual
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
            dropout_p=dropout_p,
        )
        return unfold(result, shape)
