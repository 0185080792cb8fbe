"""A linear layer, dropout, a residual and a norm in one module, as BERT has them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integrations import tiny
from torch import Tensor, nn

import fastattn
from fastattn.integrations.hypotheses import post_norm
from oracle import assert_close_to_reference

WIDTH, HIDDEN = 40, 24


class Module(nn.Module):
    """Any formula of its parts."""

    def __init__(self, formula: Callable[..., Tensor], norm: nn.Module, p: float) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, HIDDEN)
        self.drop = nn.Dropout(p)
        self.norm = norm
        self.formula = formula

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.formula(self, x, residual)


def right(m: Any, x: Tensor, residual: Tensor) -> Tensor:
    return m.norm(m.drop(m.dense(x)) + residual)


def make(formula: Any = right, norm: nn.Module | None = None, p: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    module = Module(formula, norm or nn.LayerNorm(HIDDEN, eps=1e-6), p)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def given(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(*shape, n, generator=generator) for n in (WIDTH, HIDDEN))
    return x.to(dtype), residual.to(dtype)


def run(module: nn.Module, x: Tensor, residual: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
    out = module(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The dropout of each call of ours."""
    seen: list[float] = []
    original = post_norm.PostNorm.call

    def spy(self: Any, module: Any, x: Tensor, residual: Tensor, p: float) -> Any:
        seen.append(p)
        return original(self, module, x, residual, p)

    monkeypatch.setattr(post_norm.PostNorm, "call", spy)
    return seen


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(HIDDEN)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMS], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients(norm: Any, dtype: torch.dtype, calls: list[float]) -> None:
    module = make(norm=norm(HIDDEN) if norm is nn.LayerNorm else norm()).to(dtype)
    x, residual = given(3, 7, dtype=dtype)
    eager = run(module, x, residual)
    exact = run(copy.deepcopy(module).double(), x.double(), residual.double())
    report = fastattn.accelerate(module)
    assert "" in [entry.name for entry in report.swapped]
    calls.clear()
    ours = run(module, x, residual)
    assert calls == [0.0]
    for one, theirs, expected in zip(ours, eager, exact, strict=True):
        assert_close_to_reference(one, theirs, expected)


def test_dropout_in_training_is_that_of_the_original(calls: list[float]) -> None:
    """torch's own on a CPU: from the same seed the same elements."""
    module = make(p=0.3).train()
    x, residual = given(5)
    torch.manual_seed(3)
    expected = run(module, x, residual)
    fastattn.accelerate(module)
    calls.clear()
    torch.manual_seed(3)
    torch.testing.assert_close(run(module, x, residual), expected)
    assert calls == [0.3]
    module.drop.p = 1.0  # type: ignore[union-attr, assignment]  # all of it: nothing for ours
    torch.testing.assert_close(module(x, residual), module.norm(residual))  # type: ignore[operator]
    module.eval()
    assert torch.equal(module(x, residual), module(x, residual))
    assert calls == [0.3, 0.0, 0.0]


@pytest.mark.parametrize(
    "formula",
    [
        lambda m, x, r: m.norm(m.dense(x) + m.drop(r)),
        lambda m, x, r: m.norm(m.drop(m.dense(x) + r)),
        lambda m, x, r: m.drop(m.norm(m.dense(x) + r)),
        lambda m, x, r: m.norm(m.dense(m.drop(x)) + r),
        lambda m, x, r: m.norm(m.drop(m.dense(x))) + r,
        lambda m, x, r: m.norm(m.drop(m.dense(x)) - r),
        lambda m, x, r: m.norm(m.drop(m.dense(x))),
        lambda m, x, r: m.norm(m.drop(m.dense(x).relu()) + r),
    ],
    ids=["residual dropped", "sum dropped", "norm dropped", "input dropped", "pre-norm", "minus",
         "no residual", "relu"],
)  # fmt: skip
def test_other_formulas_are_left(formula: Any) -> None:
    module = make(formula, p=0.1)
    x, residual = given(4)
    expected = module(x, residual) if not module.training else module.eval()(x, residual)
    report = fastattn.accelerate(module)
    assert "" not in [entry.name for entry in report.swapped]
    torch.testing.assert_close(module(x, residual), expected)


def test_parts_with_hooks_or_of_another_class_are_called(calls: list[float]) -> None:
    module: Any = make()
    x, residual = given(4)
    expected = module(x, residual)
    fastattn.accelerate(module)
    for part in (module.norm, module.drop):
        handle = part.register_forward_hook(lambda _, args, out: 3.0 * out)
        calls.clear()
        assert not torch.allclose(module(x, residual), expected)
        assert not calls
        handle.remove()
    seen: list[Any] = []
    module.dense.register_forward_hook(lambda _, args, out: seen.append(out))
    torch.testing.assert_close(module(x, residual), expected)
    assert len(calls) == len(seen) == 1  # the layer is called in any case
    module.norm = nn.Identity()
    torch.testing.assert_close(module(x, residual), module.dense(x) + residual)
    with pytest.raises(TypeError):
        module(x)


def test_other_shapes_and_dtypes_run_the_parts(calls: list[float]) -> None:
    module = make()
    x, residual = given(4)
    broadcast = module(x, residual[:1])
    with torch.autocast("cpu", torch.bfloat16):
        autocast = module(x, residual)
    fastattn.accelerate(module)
    calls.clear()
    torch.testing.assert_close(module(x, residual[:1]), broadcast)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, residual)
    assert found.dtype is autocast.dtype
    torch.testing.assert_close(found, autocast)
    assert not calls


def test_exclude_of_a_part() -> None:
    report = fastattn.accelerate(make(), exclude=["norm"])
    assert not report.swapped
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons[""] == "a part of it is excluded by the caller"


def test_bert_in_training(calls: list[float]) -> None:
    """With the MLP of the layer, which runs this module's forward on a view."""
    model: Any = tiny.make("bert").train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
    torch.manual_seed(5)
    expected = model(tiny.tokens(2, 9), labels=tiny.tokens(2, 9)).loss
    gradient = torch.autograd.grad(expected, model.bert.encoder.layer[0].output.dense.weight)[0]
    fastattn.accelerate(model)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        torch.manual_seed(5)
        loss = each(tiny.tokens(2, 9), labels=tiny.tokens(2, 9)).loss
        assert calls == [0.2] * 4  # two in each layer
        torch.testing.assert_close(loss, expected)
        weight = each.bert.encoder.layer[0].output.dense.weight
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], gradient, rtol=1e-4, atol=1e-6)  # fmt: skip
    fastattn.restore(model)
    assert type(model.bert.encoder.layer[0].output).__name__ == "BertOutput"


@pytest.mark.long
def test_compiled() -> None:
    module = make()
    x, residual = given(4)
    expected = module(x, residual)
    fastattn.accelerate(module)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x, residual), expected)  # fmt: skip
