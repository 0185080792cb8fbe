"""FeedForward against torch's Linear layers in sequence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn.compare import LowRank, assert_module_close
from nn.formulas import ACTIVATIONS
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from fastattn.nn import FeedForward

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def _plain(ours: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """The same by its layers, which are torch's own."""
    activation, hidden = ACTIVATIONS[ours.activation], ours.linear1(x)
    hidden = activation(hidden) if ours.gate is None else activation(ours.gate(x)) * hidden
    return ours.linear2(hidden)


def _assert_as_torch(
    ours: FeedForward, x: torch.Tensor, theirs: FeedForward | None = None, **call: Any
) -> None:
    """`theirs`: a copy from before what hooks count."""
    assert_module_close(ours, theirs or copy.deepcopy(ours), x, call_theirs=_plain, **call)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry per call of the fused op."""
    from fastattn.nn import feed_forward

    calls: list[object] = []
    original = feed_forward.ffn

    def spy(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(feed_forward, "ffn", spy)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_torch(activation: str, recompute: bool, dtype: torch.dtype) -> None:
    ours = FeedForward(12, 20, activation, recompute=recompute, dtype=dtype)
    x = torch.randn(3, 5, 12, dtype=dtype)
    _assert_as_torch(ours, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_against_torch(
    bias: bool, activation: str, recompute: bool, dtype: torch.dtype, fused_calls: list[object]
) -> None:
    ours = FeedForward(12, 20, activation, bias=bias, gated=True, recompute=recompute, dtype=dtype)
    _assert_as_torch(ours, torch.randn(3, 5, 12, dtype=dtype))
    assert fused_calls
    fused_calls.clear()
    called: list[torch.nn.Module] = []
    ours.gate.register_forward_hook(lambda m, *_: called.append(m))
    _assert_as_torch(ours, torch.randn(3, 5, 12, dtype=dtype))
    assert ours.gate in called and not fused_calls


def test_the_weights_of_a_gated_one() -> None:
    """The first two are those of a module without a gate: it comes last."""
    ours, plain = FeedForward(8, 12, bias=False, gated=True), FeedForward(8, 12, bias=False)
    shapes = {name: tuple(weight.shape) for name, weight in ours.state_dict().items()}
    plain_shapes = {name: tuple(weight.shape) for name, weight in plain.state_dict().items()}
    assert shapes == plain_shapes | {"gate.weight": (12, 8)}
    assert list(FeedForward(8, gated=True).state_dict())[-2:] == ["gate.weight", "gate.bias"]
    assert "gated=True" in repr(ours) and "gated" not in repr(plain)
    twin = pickle.loads(pickle.dumps(ours))
    assert torch.equal(twin(torch.ones(3, 8)), ours(torch.ones(3, 8)))


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 4, 12), (0, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_and_bias(bias: bool, shape: tuple[int, ...]) -> None:
    ours = FeedForward(12, bias=bias)
    _assert_as_torch(ours, torch.randn(shape))


def test_initialised_as_linear() -> None:
    torch.manual_seed(1)
    ours = FeedForward(8)
    torch.manual_seed(1)
    theirs = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
    for linear, expected in zip((ours.linear1, ours.linear2), theirs, strict=True):
        assert torch.equal(linear.weight, expected.weight)
        assert torch.equal(linear.bias, expected.bias)
    assert list(ours.state_dict()) == [
        "linear1.weight",
        "linear1.bias",
        "linear2.weight",
        "linear2.bias",
    ]


def test_plain_children_are_fused(fused_calls: list[object]) -> None:
    FeedForward(8, recompute=True)(torch.randn(2, 8))
    assert fused_calls == [{"gate": None, "gate_bias": None, "layout": "linear", "recompute": True}]


@pytest.mark.parametrize("child", ["linear1", "linear2"])
def test_hooks_of_the_children_fire(child: str, fused_calls: list[object]) -> None:
    ours = FeedForward(8)
    theirs = copy.deepcopy(ours)
    calls: list[str] = []
    linear = getattr(ours, child)
    linear.register_forward_pre_hook(lambda *_: calls.append("before"))
    linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_full_backward_hook(lambda *_: calls.append("backward"))
    _assert_as_torch(ours, torch.randn(4, 8), theirs)
    assert calls == ["before", "after", "backward"]
    assert not fused_calls


def test_hooks_for_every_module_fire() -> None:
    ours = FeedForward(8)
    called: list[torch.nn.Module] = []
    handle = torch_module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        ours(torch.randn(2, 8))
    finally:
        handle.remove()
    assert called == [ours.linear1, ours.linear2, ours.dropout, ours]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wrapped_children_run(activation: str, fused_calls: list[object]) -> None:
    ours = FeedForward(8, activation=activation)
    ours.linear1, ours.linear2 = LowRank(ours.linear1), LowRank(ours.linear2)
    _assert_as_torch(ours, torch.randn(4, 8))
    assert not fused_calls


def test_parametrised_children_run() -> None:
    ours = FeedForward(8)
    parametrizations.weight_norm(ours.linear1)
    _assert_as_torch(ours, torch.randn(4, 8))


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_of_the_hidden_layer(gated: bool, fused_calls: list[object]) -> None:
    ours, x = FeedForward(8, 40, "relu", activation_dropout=0.5, gated=gated), torch.randn(6, 8)
    torch.manual_seed(0)
    got = ours(x)
    torch.manual_seed(0)
    hidden = ours.linear1(x)
    hidden = F.relu(hidden) if ours.gate is None else F.relu(ours.gate(x)) * hidden
    torch.testing.assert_close(got, ours.linear2(F.dropout(hidden, 0.5)))
    assert not fused_calls
    ours.eval()(x)
    assert len(fused_calls) == 1
    with pytest.raises(ValueError, match="activation_dropout must be in"):
        FeedForward(8, activation_dropout=1.0)


def test_dropout_on_the_output_in_training_alone() -> None:
    ours = FeedForward(16, dropout=0.25)
    x = torch.randn(64, 16)
    kept = ours.eval()(x)
    assert torch.equal(ours(x), kept)
    torch.manual_seed(5)
    dropped = ours.train()(x)
    torch.manual_seed(5)
    assert torch.equal(ours(x), dropped)
    zeros = dropped == 0
    assert 0.15 < zeros.float().mean() < 0.35
    torch.testing.assert_close(dropped[~zeros], kept[~zeros] / 0.75)


@pytest.mark.parametrize("hooked", [False, True])
def test_compiles_without_a_graph_break(hooked: bool) -> None:
    ours = FeedForward(8)
    theirs = copy.deepcopy(ours)
    if hooked:
        ours.linear1.register_forward_hook(lambda m, args, out: out)
    compiled = torch.compile(lambda m, x: m(x), fullgraph=True, backend="aot_eager")
    _assert_as_torch(ours, torch.randn(4, 8), theirs, call=compiled)


@pytest.mark.parametrize("hooked", [False, True])
def test_autocast(hooked: bool, device: str) -> None:
    ours = FeedForward(64)
    theirs = copy.deepcopy(ours)
    if hooked:
        ours.linear1.register_forward_hook(lambda *_: None)
    x = torch.randn(8, 64)
    with torch.autocast(device, torch.bfloat16):
        result, expected = ours(x), _plain(theirs, x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


def test_repr_tells_what_it_is() -> None:
    text = repr(FeedForward(8, 12, "silu", dropout=0.1, recompute=True))
    assert "activation='silu', recompute=True" in text
    assert "Dropout(p=0.1" in text
    assert "out_features=12" in text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "gelu_new"}, "activation must be one of 'gelu_tanh'.*got 'gelu_new'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"feedforward_dim": 0}, "feedforward_dim must be positive, got 0"),
        ({"embed_dim": -8}, "embed_dim must be positive, got -8"),
    ],
)
def test_constructor_refuses(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedForward(**{"embed_dim": 8, **kwargs})


def test_input_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"in_features = 7.*got \(32, 8\)"):
        FeedForward(8)(torch.randn(2, 7))


@pytest.mark.parametrize(
    "arguments",
    [
        {"embed_dim": "8"}, {"embed_dim": 8.0}, {"feedforward_dim": True}, {"dropout": "0.1"},
        {"dropout": None},
    ],
    ids=str,
)  # fmt: skip
def test_constructor_refuses_other_types(arguments: dict) -> None:
    (name,) = arguments
    with pytest.raises(TypeError, match=f"{name} must be a"):
        FeedForward(**{"embed_dim": 8, **arguments})
    with pytest.raises(ValueError, match=r"activation must be one of .*got \['relu'\]"):
        FeedForward(8, activation=["relu"])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_jit_trace(gated: bool, activation: str) -> None:
    """With the check of torch.jit.trace, which runs again without gradients."""
    module = FeedForward(8, activation=activation, gated=gated)
    x = torch.randn(5, 8)
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x[:2]), module(x[:2]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_nested_tensors(gated: bool, layout: torch.layout, activation: str) -> None:
    module = FeedForward(8, activation=activation, gated=gated)
    rows = [torch.randn(n, 8) for n in (2, 5)]
    with torch.no_grad():
        out = module(torch.nested.nested_tensor(rows, layout=layout))
        for row, expected in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(row, module(expected))
