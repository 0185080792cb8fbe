"""A moving average of the trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.training.steps.gradients import local


class Average:
    """The exponential moving average of a model's trained weights, in float32 or better.

        average = decay * average + (1 - decay) * weight      after each step

    with the decay of step t at most (1 + t) / (10 + t), so that the first weights are soon
    forgotten.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._weights = [parameter.detach() for parameter in trained.values()]
        self.tensors: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in trained.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = [local(average) for average in self.tensors.values()]
        weights = [local(weight).to(a.dtype) for weight, a in zip(self._weights, averages)]
        torch._foreach_lerp_(averages, weights, share)

    @torch.no_grad()
    def install(self) -> None:
        """Give the model the averaged weights."""
        for weight, average in zip(self._weights, self.tensors.values()):
            weight.copy_(average)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The model with the averaged weights; afterwards it has its own again, bit for bit."""
        own = [weight.clone() for weight in self._weights]
        self.install()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self._weights, own):
                    weight.copy_(value)
