"""A linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.linear import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear`, faster where a few rows go through it on a CPU without gradients.

    That is what decoding does, token by token. Constructor, initial values, ``state_dict`` and
    ``repr`` are torch's, and so is every product that is not of that kind.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)
