"""A linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.linear import product


class _FoundAsLinear(type):
    """Classes that equal `torch.nn.Linear`, so that a table of classes has its entry for them too.

    `torch.ao.quantization.quantize_dynamic` and others look a module up by its exact class.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is torch.nn.Linear

    def __hash__(cls) -> int:
        return hash(torch.nn.Linear)


class Linear(torch.nn.Linear, metaclass=_FoundAsLinear):
    """`torch.nn.Linear`, faster where a few rows go through it on a CPU without gradients.

    That is what decoding does, token by token. Constructor, initial values, ``state_dict`` and
    ``repr`` are torch's, and so is every product that is not of that kind. Whoever looks for
    `torch.nn.Linear` by class (`torch.ao.quantization.quantize_dynamic`) finds this one too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return product(input, self.weight, self.bias)
