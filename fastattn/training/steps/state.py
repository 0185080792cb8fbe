"""Everything that a training run changes, as tensors and JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.training.history import History
from fastattn.training.steps.average import Average


@dataclass
class TrainingState:
    """All that a step changes. The generators are not in it: each step seeds them.

    Attributes:
        average: of the weights; None without one.
        scaler: of the loss, for float16.
        history: the record, whose last step is the one that the run is at.
    """

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: Average | None
    scaler: torch.amp.GradScaler
    history: History

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.history.steps[-1].step if self.history.steps else 0

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters and the buffers by their names in `state_dict`, shared ones once.

        They are the model's own, not copies.
        """
        return self.weights_of(self.model)

    @staticmethod
    def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
        """`weights` of a model."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
            if isinstance(tensor, Tensor) and not frozen:
                found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    def tensors(self) -> dict[str, Tensor]:
        """The optimisers' tensors, and the average's."""
        tensors = {
            f"optimizer.{number}.{parameter}.{name}": value
            for number, parameter, name, value in self._optimizer_values()
            if isinstance(value, Tensor)
        }
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.tensors.items()}
        return tensors

    def scalars(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {
            "step": self.step,
            "optimizer": {
                f"{number}.{parameter}.{name}": value
                for number, parameter, name, value in self._optimizer_values()
                if not isinstance(value, Tensor)
            },
            "scaler": self.scaler.state_dict(),
            "history": self.history.as_dict(),
        }

    @torch.no_grad()
    def load(
        self, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], scalars: dict[str, Any]
    ) -> None:
        """Take over what `weights`, `tensors` and `scalars` gave for a state of the same run.

        Raises:
            ValueError: a tensor is missing, or has another shape.
            KeyError, TypeError, AttributeError: something else is not as `scalars` gave it.
        """
        for name, tensor in self.weights().items():
            _take(tensor, name, weights)
        values: dict[str, Any] = {
            name.removeprefix("optimizer."): value
            for name, value in tensors.items()
            if name.startswith("optimizer.")
        }
        values |= scalars["optimizer"]
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimizers]
        for key, value in values.items():
            number, parameter, name = key.split(".", 2)
            states[int(number)].setdefault(int(parameter), {})[name] = value
        for optimizer, state in zip(self.optimizers, states):
            _check_shapes(optimizer, state)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.average is not None:
            for name, tensor in self.average.tensors.items():
                _take(tensor, f"average.{name}", tensors)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scalars["scaler"])
        loaded = History.from_dict(scalars["history"])
        # In place: the caller may hold it.
        vars(self.history).update(vars(loaded) | {"interrupted": False})

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """The model with the weights that are evaluated and saved: the average, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.installed()

    def _optimizer_values(self) -> list[tuple[int, int, str, Any]]:
        return [
            (number, parameter, name, value)
            for number, optimizer in enumerate(self.optimizers)
            for parameter, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        ]


def _take(tensor: Tensor, name: str, given: Mapping[str, Tensor]) -> None:
    """Copy; without the check a tensor of another shape would be broadcast."""
    if given[name].shape != tensor.shape:
        shapes = f"{tuple(tensor.shape)}, got {tuple(given[name].shape)}"
        raise ValueError(f"{name} must have the shape {shapes}")
    tensor.copy_(given[name])


def _check_shapes(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """A fused step walks through all tensors of a parameter by the parameter's size."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state.items():
        if not 0 <= number < len(parameters):
            raise ValueError(f"the optimizer has no parameter {number}")
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape not in (parameters[number].shape, ()):
                raise ValueError(f"{name} of the optimizer has the shape {tuple(value.shape)}")
