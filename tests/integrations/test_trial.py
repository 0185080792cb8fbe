"""`batch=`: what accelerate and verify make of an input of the user."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integrations.tiny import classes, names

import fastattn
from fastattn.integrations import swap, torch_nn

ROWS = 11  # of the batch, and of no probe


class Model(torch.nn.Module):
    """Norms around a layer with running statistics; two are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.LayerNorm(16)
        self.before = torch.nn.LayerNorm(16)
        self.batch_norm = torch.nn.BatchNorm1d(16)
        self.drop = torch.nn.Dropout(0.5)
        self.after = torch.nn.RMSNorm(16)
        self.different = torch.nn.LayerNorm(16, eps=1e-3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        y = self.after(self.drop(self.batch_norm(self.before(x)))) * scale
        return {"loss": y.square().mean(), "y": y}


@pytest.fixture
def model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return Model().to(device)


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(ROWS, 16, device=device)


class Swapping:
    """A LayerNorm that is ours, but does something else on the batch."""

    def act(self, out: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)  # type: ignore[misc]
        return self.act(out) if len(input) == ROWS else out


class Slow(Swapping, fastattn.nn.LayerNorm):
    def act(self, out: torch.Tensor) -> torch.Tensor:
        time.sleep(1e-3)
        return out


class Doubled(Swapping, fastattn.nn.LayerNorm):
    def act(self, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 0.5 * (out > 0))


class NotANumber(Swapping, fastattn.nn.LayerNorm):
    def act(self, out: torch.Tensor) -> torch.Tensor:
        return out * torch.nan


@pytest.fixture
def swapped_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(swap, "_replacements", {})

    def use(mixin: type) -> None:
        row = dataclasses.replace(torch_nn.TABLE[torch.nn.LayerNorm], mixin=mixin)
        monkeypatch.setitem(torch_nn.TABLE, torch.nn.LayerNorm, row)

    yield use


@pytest.mark.parametrize("training", [False, True])
def test_what_is_slower_on_the_batch_is_left_alone(
    model: torch.nn.Module, x: torch.Tensor, swapped_to: Any, training: bool
) -> None:
    swapped_to(Slow)
    report = fastattn.accelerate(model.train(training), batch=x)
    # Equal modules share a measurement; where the batch does not reach, there is none.
    assert set(names(report.swapped)) - {"after"} == {"different"}
    assert names(report.untimed) == ["different"]
    assert report.untimed[0].reason == "the batch does not reach it"
    reason = next(entry.reason for entry in report.left if entry.name == "before")
    assert reason is not None and reason.startswith("slower on the batch: 0.")
    assert reason.endswith("forward and backward" if training else ", forward")
    assert type(model.before) is torch.nn.LayerNorm


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_forms_of_a_batch(model: torch.nn.Module, x: torch.Tensor, form: str) -> None:
    batch = {"tensor": x, "tuple": (x, 2.0), "mapping": {"x": x, "scale": 2.0}}[form]
    fastattn.accelerate(model, only=["before"])
    trial = fastattn.verify(model, batch).trial
    assert trial is not None
    assert [d.name for d in trial.outputs] == ["loss", "y"]
    assert {"before.weight", "after.weight"} <= {d.name for d in trial.gradients}
    assert "unused.weight" not in {d.name for d in trial.gradients}
    assert all(d.relative < 1e-5 for d in (*trial.outputs, *trial.gradients))
    ((speed, count),) = trial.speeds
    assert (speed.class_name, count) == ("LayerNorm", 1)
    assert speed.backward
    assert "gradients  " in str(trial) and "LayerNorm" in str(trial)


def test_differences_are_found(model: torch.nn.Module, x: torch.Tensor, swapped_to: Any) -> None:
    swapped_to(Doubled)
    fastattn.accelerate(model, only=["before"])
    trial = fastattn.verify(model, x).trial
    assert trial is not None
    assert max(d.relative for d in trial.outputs) > 1e-2
    assert max(d.relative for d in trial.gradients) > 1e-2
    swapped_to(NotANumber)
    fastattn.restore(model)
    fastattn.accelerate(model, only=["before"])
    with pytest.raises(RuntimeError, match="not finite where the original"):
        fastattn.verify(model, x)


def test_leaves_no_trace(model: torch.nn.Module, x: torch.Tensor) -> None:
    model.drop.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    calls: list[str] = []
    model.before.register_forward_hook(lambda *_: calls.append("before"))
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state, given = torch.get_rng_state(), x.clone()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastattn.accelerate(model, batch=x)
    fastattn.verify(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given) and not x.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(tensor, tensors[n]) for n, tensor in model.state_dict().items())
    assert calls  # the model did run


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_whatever_the_callers_grad_mode(
    model: torch.nn.Module, x: torch.Tensor, context: Any
) -> None:
    with context():
        x = x.clone()
        fastattn.accelerate(model, batch=x)
        trial = fastattn.verify(model, x).trial
    assert trial is not None and trial.gradients


def test_an_error_of_the_model_leaves_it_as_it_was(model: torch.nn.Module) -> None:
    before = classes(model)
    with pytest.raises(RuntimeError):
        fastattn.accelerate(model, batch=torch.randn(ROWS, 5))
    assert classes(model) == before
    fastattn.accelerate(model)
    swapped = classes(model)
    with pytest.raises(RuntimeError):
        fastattn.verify(model, torch.randn(ROWS, 5))
    assert classes(model) == swapped
    assert not any(module._forward_pre_hooks for module in model.modules())


class OnlyOnce(Swapping, fastattn.nn.LayerNorm):
    """Cannot be called with the batch's arguments."""

    def act(self, out: torch.Tensor) -> torch.Tensor:
        raise ValueError("this was called out of its place")


def test_what_cannot_be_repeated_is_not_timed(
    model: torch.nn.Module, x: torch.Tensor, swapped_to: Any
) -> None:
    swapped_to(OnlyOnce)
    report = fastattn.accelerate(model, only=["before"], batch=x)
    assert names(report.swapped) == ["before"]
    reason = "its call cannot be repeated: ValueError: this was called out of its place"
    assert [(entry.name, entry.reason) for entry in report.untimed] == [("before", reason)]
    assert str(report).splitlines()[-1].split()[:4] == ["untimed", "LayerNorm", "1", "torch"]
    assert str(report).endswith(f"before: {reason}")


def test_frozen_models_have_no_gradients(model: torch.nn.Module, x: torch.Tensor) -> None:
    fastattn.accelerate(model.requires_grad_(False), batch=x)
    trial = fastattn.verify(model, x).trial
    assert trial is not None and not trial.gradients and len(trial.outputs) == 2
