"""The state of a run: what a checkpoint has of it, and where that goes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from training.small import model, with_changes

from fastattn.training.history import History
from fastattn.training.steps.average import Average
from fastattn.training.steps.optimizers import optimizers_of
from fastattn.training.steps.precision import loss_scaler
from fastattn.training.steps.state import TrainingState

TURNED = "blocks.0.attention.in_proj.weight"


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.flip(0) if name == TURNED and tensor.dim() else tensor


def _state(seed: int, steps: int, turned: bool = False, optimizer: str = "adamw") -> TrainingState:
    """A state after some steps with random gradients."""
    subject = model(seed)
    if turned:
        own = subject.get_parameter(TURNED)
        own.data = own.data.flip(0)
    how = {"canonical": _turned, "localised": _turned} if turned else {}
    config = with_changes(optimizer=optimizer)
    state = TrainingState(
        subject, optimizers_of(subject, config), Average(subject, 0.9),
        loss_scaler(torch.device("cpu"), "float32"), History(), **how,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for name, parameter in subject.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = _turned(name, gradient) if turned else gradient
        for each in state.optimizers:
            each.step()
        state.average.update(step + 1)
    return state


def _loaded(into: TrainingState, of: TrainingState) -> None:
    tensors = of.tensors()
    places = into.empty({name: (t.shape, t.dtype) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    into.load(places, json.loads(json.dumps(of.scalars())))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_is_that_of_which_it_was_loaded(optimizer: str) -> None:
    """By the names of the parameters, into one that has taken other steps or none."""
    source = _state(0, 3, optimizer=optimizer)
    expected = {name: tensor.clone() for name, tensor in source.tensors().items()}
    kinds = {name.partition(".")[0] for name in expected}
    assert kinds == {"weight", "average", "optimizer"}
    for steps in (0, 2):
        other = _state(1, steps, optimizer=optimizer)
        _loaded(other, source)
        found = other.tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_are_in_one_process_order_in_a_checkpoint() -> None:
    """A model with the rows of a weight in another order writes and reads those of an ordinary one."""
    plain, turned = _state(0, 3), _state(0, 3, turned=True)
    expected, found = plain.tensors(), turned.tensors()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-8), name
    assert not torch.allclose(
        turned.weights()[TURNED], plain.weights()[TURNED], rtol=1e-3, atol=1e-3
    )
    other = _state(1, 1, turned=True)
    _loaded(other, plain)
    assert torch.equal(other.weights()[TURNED], plain.weights()[TURNED].flip(0))
    moments = [state["exp_avg"] for state in other.optimizers[0].state.values()]
    wanted = plain.tensors()[f"optimizer.{TURNED}.exp_avg"].flip(0)
    assert any(m.shape == wanted.shape and torch.equal(m, wanted) for m in moments)
