"""What it means to be a drop-in: the constructor, state, repr and class of torch's module."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch

import fastattn

Call = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


def _call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def _attend(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, x, x, need_weights=False)[0]


def _translate(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, 2.0 - x)


TRANSFORMERS = ("TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer")
STACKS = ("TransformerEncoder", "TransformerDecoder")
NAMES = ("LayerNorm", "RMSNorm", "Linear", "MultiheadAttention", *TRANSFORMERS, *STACKS)

# Every argument of each constructor away from its default at least once.
CASES = [
    ("LayerNorm", (16,), {}, _call),
    ("LayerNorm", (16,), {"bias": False, "eps": 1e-3}, _call),
    ("LayerNorm", ([4, 16],), {"elementwise_affine": False}, _call),
    ("RMSNorm", (16,), {}, _call),
    ("RMSNorm", ((4, 16),), {"eps": 1e-3}, _call),
    ("RMSNorm", (16,), {"elementwise_affine": False}, _call),
    ("Linear", (16, 24), {}, _call),
    ("Linear", (16, 24), {"bias": False}, _call),
    ("MultiheadAttention", (16, 2), {}, _attend),
    ("MultiheadAttention", (16, 4), {"bias": False, "batch_first": True}, _attend),
    ("MultiheadAttention", (16, 4), {"kdim": 16, "vdim": 16, "dropout": 0.5}, _attend),
    ("MultiheadAttention", (16, 4), {"add_bias_kv": True, "add_zero_attn": True}, _attend),
    ("TransformerEncoderLayer", (16, 2, 24), {}, _call),
    (
        "TransformerEncoderLayer",
        (16, 4),
        {"dim_feedforward": 24, "dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-3},
        _call,
    ),
    (
        "TransformerEncoderLayer",
        (16, 4, 24, 0.5, torch.nn.SiLU()),
        {"batch_first": True, "norm_first": True, "bias": False},
        _call,
    ),
    ("TransformerDecoderLayer", (16, 2, 24), {}, _translate),
    (
        "TransformerDecoderLayer",  # torch's copy of one with a module for activation has ReLU
        (16, 4, 24, 0.5, torch.nn.functional.silu),
        {"layer_norm_eps": 1e-3, "batch_first": True, "norm_first": True, "bias": False},
        _translate,
    ),
    ("Transformer", (16, 2, 1, 2, 24), {"batch_first": True}, _translate),
    ("Transformer", (16, 4, 2, 1, 24, 0.0, "gelu"), {"norm_first": True}, _translate),
]


def _both(name: str, args: tuple, kwargs: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    modules = []
    for namespace in (fastattn.nn, torch.nn):
        torch.manual_seed(3)
        modules.append(getattr(namespace, name)(*args, **kwargs))
    return modules[0], modules[1]


def _input() -> torch.Tensor:
    return torch.randn(2, 4, 16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signature_begins_with_torchs(name: str, method: str) -> None:
    signatures = (
        inspect.signature(getattr(getattr(namespace, name), method))
        for namespace in (fastattn.nn, torch.nn)
    )
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in signature.parameters.values()]
        for signature in signatures
    )
    assert ours[: len(theirs)] == theirs
    if method == "__init__":
        assert len(ours) == len(theirs)
    else:  # what we add can be left away
        assert all(default is not inspect.Parameter.empty for _, _, default in ours[len(theirs) :])


@pytest.mark.parametrize(("name", "args", "kwargs", "call"), CASES)
def test_same_seed_same_module(name: str, args: tuple, kwargs: dict, call: Call) -> None:
    ours, theirs = _both(name, args, kwargs)
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(("name", "args", "kwargs", "call"), CASES)
def test_state_dict_goes_both_ways(name: str, args: tuple, kwargs: dict, call: Call) -> None:
    ours, theirs = _both(name, args, kwargs)
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        x = _input()
        torch.testing.assert_close(call(ours.eval(), x), call(theirs.eval(), x))


@pytest.mark.parametrize(("name", "args", "kwargs", "call"), CASES)
def test_class_swap_and_back(name: str, args: tuple, kwargs: dict, call: Call) -> None:
    _, module = _both(name, args, kwargs)
    module.eval()
    parameters = {key: id(value) for key, value in module.named_parameters()}
    attributes = dict(vars(module))
    x = _input()
    before = call(module, x)

    module.__class__ = getattr(fastattn.nn, name)
    torch.testing.assert_close(call(module, x), before)
    assert {key: id(value) for key, value in module.named_parameters()} == parameters
    assert vars(module) == attributes

    module.__class__ = getattr(torch.nn, name)
    assert torch.equal(call(module, x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(("name", "args", "kwargs", "call"), CASES)
def test_deepcopy_and_pickle(
    name: str,
    args: tuple,
    kwargs: dict,
    call: Call,
    copied: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    ours, _ = _both(name, args, kwargs)
    twin = copied(ours)
    assert type(twin) is type(ours)
    x = _input()
    assert torch.equal(call(twin.eval(), x), call(ours.eval(), x))
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter)
    if list(ours.parameters()):
        assert not torch.equal(call(twin, x), call(ours, x)), "the copy shares its parameters"


@pytest.mark.parametrize(("name", "args", "kwargs", "call"), CASES)
def test_device_and_dtype(name: str, args: tuple, kwargs: dict, call: Call) -> None:
    ours = getattr(fastattn.nn, name)(*args, **kwargs, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in ours.parameters())
