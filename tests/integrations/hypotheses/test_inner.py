"""MLPs that are written into the forward of a larger module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from integrations.tiny import HIDDEN, fresh
from torch import Tensor, nn

import fastattn
from fastattn.integrations import swap


class Layer(nn.Module):
    """As BART has it, without the attention."""

    def __init__(self, dropout: float = 0.0, inside: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.fc2, self.fc1 = nn.Linear(40, HIDDEN), nn.Linear(HIDDEN, 40)
        self.activation_fn = nn.GELU()
        self.dropout, self.activation_dropout = dropout, inside

    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.activation_dropout, self.training)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        h = self.activation_fn(self.fc1(self.norm(hidden_states)))
        h = F.dropout(self.fc2(self.between(h)), self.dropout, self.training)
        return (hidden_states + h,)


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(HIDDEN, 40), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(40, HIDDEN), nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(0.3)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(h)) + x)


class Halves(nn.Module):
    """As BERT has it: the MLP is in two modules, of which neither is one."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = Intermediate(), Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.chunk(x)

    def chunk(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class WithResidual(nn.Module):
    """As BLOOM has it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) + residual


def call(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x, x.flip(0)) if isinstance(module, WithResidual) else module(x)
    return out[0] if isinstance(out, tuple) else out


SWAPPED = {
    "in a layer": Layer(),
    "dropout after it": Layer(dropout=0.5),
    "dropout inside": Layer(dropout=0.5, inside=0.5),
    "in two modules": Halves(),
    "with a residual": WithResidual(),
}


class Clamped(Layer):
    def between(self, h: Tensor) -> Tensor:
        return h.clamp(max=0.5)


class SecondUse(Layer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        (out,) = super().forward(hidden_states)
        return (out * self.fc1(hidden_states).mean(),)


class NoSuper(Layer):
    """`super()` asks for an instance of its class, which the view of a layer is not."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return super().forward(hidden_states)


class OfTheWeight(Layer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (hidden_states + self.fc2(self.activation_fn(hidden_states @ self.fc1.weight.T)),)


NOT_SWAPPED = {
    "clamped": Clamped(),
    "used again": SecondUse(),
    "super": NoSuper(),
    "the weight itself": OfTheWeight(),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_and_equal(name: str, device: str, x: Tensor) -> None:
    ours, theirs = fresh(SWAPPED[name], device), fresh(SWAPPED[name], device)
    report = fastattn.accelerate(ours)
    assert "" in {entry.name for entry in report.swapped}, report
    norms = {n for n, m in theirs.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms <= {entry.name for entry in report.swapped}  # they are examined on their own
    assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
    for training in (False, True):
        results = []
        for model in (ours, theirs):
            model.train(training)
            torch.manual_seed(0)
            out = call(model, x)
            grads = torch.autograd.grad(out.square().sum(), [*model.parameters()])
            results.append([out, *grads])
        for mine, other in zip(*results):
            torch.testing.assert_close(mine, other)
    fastattn.verify(ours)
    fastattn.restore(ours)
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", NOT_SWAPPED)
def test_left_alone(name: str, device: str, x: Tensor) -> None:
    module = fresh(NOT_SWAPPED[name], device)
    expected = call(module, x)
    report = fastattn.accelerate(module)
    (entry,) = (e for e in report.left if e.name == "")
    assert str(entry.reason).startswith("no MLP of fc1, gelu, fc2 inside: ")
    torch.testing.assert_close(call(module, x), expected)


def test_it_is_one_op(device: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.integrations.hypotheses import inner

    modules = {name: fresh(SWAPPED[name], device) for name in SWAPPED}
    for module in modules.values():
        fastattn.accelerate(module)
    given: list[Tensor] = []
    run = inner.ffn
    monkeypatch.setattr(inner, "ffn", lambda **kw: given.append(kw["x"]) or run(**kw))
    for name, module in modules.items():
        for training in (False, True):
            given.clear()
            call(module.train(training), x)
            # The original runs where elements of the hidden layer may be dropped.
            assert len(given) == (not training or "dropout" not in name), name


@pytest.mark.parametrize("name", ("in a layer", "in two modules"))
def test_copies_and_compiles(name: str, device: str, x: Tensor) -> None:
    model = fresh(SWAPPED[name], device)
    expected = call(model, x)
    fastattn.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), compiled):
        torch.testing.assert_close(call(other, x), expected)


@pytest.mark.parametrize(
    ("name", "part"),
    [("in a layer", "fc1"), ("in a layer", "activation_fn"), ("in two modules", "output"),
     ("in two modules", "intermediate"), ("in two modules", "output.dense")],
)  # fmt: skip
def test_parts_with_hooks_are_called(name: str, part: str, device: str, x: Tensor) -> None:
    model, calls = fresh(SWAPPED[name], device), []
    expected = call(model, x)
    fastattn.accelerate(model)
    model.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    torch.testing.assert_close(call(model, x), expected)
    assert calls == [part]
    (entry,) = (e for e in fastattn.verify(model).left if e.name == "")
    assert f"{part} is a" in str(entry.reason)


def test_another_part_in_its_place(device: str, x: Tensor) -> None:
    for change in (
        lambda m: setattr(m, "activation_fn", nn.Tanh()),
        lambda m: setattr(m, "fc1", nn.Sequential(m.fc1, nn.Identity())),
    ):
        ours, theirs = fresh(SWAPPED["in a layer"], device), fresh(SWAPPED["in a layer"], device)
        fastattn.accelerate(ours)
        for model in (ours, theirs):
            change(model)
        torch.testing.assert_close(call(ours, x), call(theirs, x))
    ours = fresh(Layer(), device)
    del ours.activation_fn
    ours.activation_fn = F.gelu
    assert "" in {entry.name for entry in fastattn.accelerate(ours).swapped}
    ours.activation_fn = F.relu  # a function too
    theirs.fc1, theirs.fc2, theirs.norm = ours.fc1, ours.fc2, ours.norm
    theirs.activation_fn = nn.ReLU()
    torch.testing.assert_close(call(ours, x), call(theirs, x))


def test_an_attribute_that_forward_sets_is_the_modules(device: str, x: Tensor) -> None:
    class Counts(Layer):
        calls = 0

        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None):
            self.calls = self.calls + 1
            return (hidden_states + self.fc2(self.activation_fn(self.fc1(hidden_states))),)

    module = Counts().to(device)
    assert "" in {entry.name for entry in fastattn.accelerate(module).swapped}
    call(module, x)
    assert module.calls == 1


def test_gradient_checkpointing_of_a_layer(device: str, x: Tensor) -> None:
    layers = pytest.importorskip("transformers.modeling_layers")
    if "__init_subclass__" not in vars(layers.GradientCheckpointingLayer):
        pytest.skip("this transformers checkpoints in __call__")

    class Checkpointed(layers.GradientCheckpointingLayer, Layer):
        forward = Layer.forward

    model, runs = Checkpointed().to(device), []
    fastattn.accelerate(model)
    assert isinstance(model, swap.Swapped)

    def checkpoint(function, *args):
        runs.append(1)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    model.gradient_checkpointing, model._gradient_checkpointing_func = True, checkpoint
    call(model.train(), x).sum().backward()
    assert runs == [1]  # once, not once more by the original's own
