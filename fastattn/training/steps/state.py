"""Everything that a training run changes, as tensors and JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.training.history import History
from fastattn.training.steps.average import Average


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class TrainingState:
    """All that a step changes. The generators are not in it: each step seeds them.

    Attributes:
        average: of the weights; None without one.
        scaler: of the loss, for float16.
        history: the record, whose last step is the one that the run is at.
        canonical: gives a tensor of the parameter of a name, and of its optimiser's state, with the
            rows in one process' order; `localised` is the reverse. They matter where a model that
            is divided among processes has another order.
    """

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: Average | None
    scaler: torch.amp.GradScaler
    history: History
    canonical: Callable[[str, Tensor], Tensor] = as_it_is
    localised: Callable[[str, Tensor], Tensor] = as_it_is

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.history.steps[-1].step if self.history.steps else 0

    @staticmethod
    def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
        """The trained parameters and the buffers by their names in `state_dict`, shared ones once.

        They are the model's own, not copies.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
            if isinstance(tensor, Tensor) and not frozen:
                found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint: "weight.NAME", "average.NAME", "optimizer.NAME.VALUE".

        The optimisers' go by the names of the parameters, so that they fit whichever process has
        which parameter. Those of a sharded model are DTensors, with the rows in one process' order.
        """
        tensors = self._own() | {
            f"optimizer.{name}.{key}": value
            for name, key, value in self._optimizer_values()
            if isinstance(value, Tensor)
        }
        return {name: self.canonical(_parts(name)[1], t) for name, t in tensors.items()}

    def scalars(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {
            "step": self.step,
            "optimizer": {
                f"{name}.{key}": value
                for name, key, value in self._optimizer_values()
                if not isinstance(value, Tensor)
            },
            "scaler": self.scaler.state_dict(),
            "history": self.history.as_dict(),
        }

    def empty(self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Where the tensors of a checkpoint go, for `load`: parts of them where parameters are.

        Args:
            saved: the sizes and dtypes in the checkpoint.

        Raises:
            KeyError: the checkpoint has a tensor of a name that the model does not have.
            ValueError: it lacks one, or has one of another shape. An optimiser's step would read as
                many values as the parameter has.
        """
        own = self._own()
        if missing := own.keys() - saved.keys():
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        empty: dict[str, Tensor] = {}
        for name, (size, dtype) in saved.items():
            like = own[name if name in own else f"weight.{_parts(name)[1]}"].detach()
            if like.shape == size:
                empty[name] = torch.empty_like(like, dtype=dtype)
            elif name not in own and not size:  # a number of the optimiser's
                empty[name] = torch.empty(size, dtype=dtype)
            else:
                shapes = f"{tuple(like.shape)}, got {tuple(size)}"
                raise ValueError(f"{name} of the checkpoint must have the shape {shapes}")
        return empty

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], scalars: dict[str, Any]) -> None:
        """Take over what `tensors` and `scalars` gave for a state of the same run."""
        for name, tensor in self._own().items():
            tensor.copy_(self.localised(_parts(name)[1], tensors[name]))
        states: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            kind, parameter, key = _parts(name)
            if kind == "optimizer":
                states.setdefault(parameter, {})[key] = self.localised(parameter, value)
        for name, value in scalars["optimizer"].items():
            parameter, _, key = name.rpartition(".")
            states.setdefault(parameter, {})[key] = value
        names = self._names()
        for optimizer in self.optimizers:
            groups = optimizer.state_dict()["param_groups"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: states[names[id(parameter)]]
                for number, parameter in enumerate(parameters)
                if names[id(parameter)] in states
            }
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scalars["scaler"])
        loaded = History.from_dict(scalars["history"])
        # In place: the caller may hold it.
        vars(self.history).update(vars(loaded) | {"interrupted": False})

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """The model with the weights that are evaluated and saved: the average, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.installed()

    def _own(self) -> dict[str, Tensor]:
        """The weights and their averages, by the names that they have in a checkpoint."""
        own = {f"weight.{name}": tensor for name, tensor in self.weights_of(self.model).items()}
        if self.average is not None:
            own |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return own

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in self.weights_of(self.model).items()}

    def _optimizer_values(self) -> list[tuple[str, str, Any]]:
        """The parameter's name, the value's, the value."""
        names = self._names()
        return [
            (names[id(parameter)], key, value)
            for optimizer in self.optimizers
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        ]


def _parts(name: str) -> tuple[str, str, str]:
    """What a tensor of a checkpoint is, the parameter's name, and an optimiser's for the value."""
    kind, _, rest = name.partition(".")
    parameter, _, key = rest.rpartition(".") if kind == "optimizer" else (rest, "", "")
    return kind, parameter, key
