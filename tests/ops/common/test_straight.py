"""The straight way of plain calls on a CPU: the same bits and errors as the described way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import explanation_of
from fastattn.ops.attention import interface as attention_interface
from fastattn.ops.common.straight import DTYPES
from fastattn.ops.ffn import interface as ffn_interface
from fastattn.ops.layer_norm import interface as norm_interface

INTERFACES = (attention_interface, ffn_interface, norm_interface)
FUNCTIONS = (fastattn.attention, fastattn.ffn, fastattn.layer_norm, fastattn.rms_norm)
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call went straight."""
    went: list[bool] = []

    def spy(run: Callable[..., Any], *arguments: Any) -> Any:
        result = run(*arguments)
        went.append(result is not None)
        return result

    for interface in INTERFACES:
        aten = interface.aten
        monkeypatch.setattr(aten, "straight", functools.partial(spy, aten.straight))
    return went


def described(call: Call) -> Any:
    """The result on the long way, which a call that names its backend takes."""
    function, arguments, options = call
    return function(*arguments, **options, backend="torch")


def qkv(
    seqlen_q: int = 5, seqlen_k: int = 5, heads: int = 4, kv_heads: int = 4, dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = ((2, seqlen_q, heads, dim), *[(2, seqlen_k, kv_heads, dim)] * 2)
    return tuple(rand(*shape, dtype=dtype) for shape in shapes)


def weights(layout: str = "linear", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    first, second = ((6, 4), (3, 6)) if layout == "linear" else ((4, 6), (6, 3))
    return tuple(rand(*shape, dtype=dtype) for shape in (first, (6,), second, (3,)))


def plain_calls(dtype: torch.dtype) -> list[Call]:
    x, w, b, r = rand(3, 8, dtype=dtype), *(rand(8, dtype=dtype) for _ in "wb"), rand(3, 8)
    r = r.to(dtype)
    calls: list[Call] = [
        (fastattn.layer_norm, (x, w, b), {}),
        (fastattn.layer_norm, (x,), {"eps": 1e-3}),
        (fastattn.layer_norm, (x, w), {"residual": r}),
        (fastattn.layer_norm, (x, None, b, 0.0, r), {}),
        (fastattn.layer_norm, (x[:0], w), {}),
        (fastattn.rms_norm, (x, w), {}),
        (fastattn.rms_norm, (x, None, 1e-6), {"residual": r}),
        (fastattn.rms_norm, (x.t().contiguous().t(),), {}),
        (fastattn.attention, qkv(dtype=dtype), {}),
        (fastattn.attention, qkv(dtype=dtype), {"causal": True}),
        (fastattn.attention, qkv(5, 9, dtype=dtype), {"softmax_scale": 0.3}),
        (fastattn.attention, qkv(1, 9, 4, 2, dtype=dtype), {"causal": True}),
        (fastattn.attention, qkv(4, 4, 4, 1, dtype=dtype), {"causal": True}),
        (fastattn.attention, qkv(1, 1, dtype=dtype), {"causal": True}),
    ]
    for layout in ("linear", "conv1d"):
        w1, b1, w2, b2 = weights(layout, dtype)
        for activation in ("gelu_tanh", "gelu", "relu", "silu"):
            arguments = rand(2, 5, 4, dtype=dtype), w1, b1, w2, b2, activation
            calls.append((fastattn.ffn, arguments, {"layout": layout}))
        calls.append((fastattn.ffn, (rand(4, dtype=dtype), w1, None, w2, b2), {"layout": layout}))
        calls.append(
            (fastattn.ffn, (rand(0, 4, dtype=dtype), w1, b1, w2, None), {"layout": layout})
        )
    return calls


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("grad", ["none", "all", "one", "forbidden"])
def test_the_same_bits(dtype: torch.dtype, grad: str, straight: list[bool]) -> None:
    """Of the results, and of the gradients of all inputs or of the last one alone."""
    for call in plain_calls(dtype):
        function, arguments, options = call
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        for x in tensors if grad in ("all", "forbidden") else tensors[-1:] * (grad == "one"):
            x.requires_grad_()
        with torch.set_grad_enabled(grad != "forbidden"):
            out, expected = function(*arguments, **options), described(call)
        assert straight.pop() and not straight
        assert explanation_of(function, *arguments, **options).backend == "torch"
        outs = (out, expected) if isinstance(out, tuple) else ((out,), (expected,))
        for ours, theirs in zip(*outs, strict=True):
            assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
            assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad
        if grad in ("all", "one"):
            wanted = [x for x in tensors if x.requires_grad]
            grads = (torch.autograd.grad(o[0].sum(), wanted, allow_unused=True) for o in outs)
            for ours, theirs in zip(*grads, strict=True):
                assert ours is theirs is None or torch.equal(ours, theirs)


X, W, R = rand(3, 8), rand(8), rand(3, 8)
QKV = qkv()
F1, (W1, B1, W2, B2) = rand(5, 4), weights()

# What ATen would take, or take in another sense, and what only the long way can.
OTHERS: list[Call] = [
    (fastattn.layer_norm, (X.double(), W.double()), {}),
    (fastattn.layer_norm, (X.half(), W), {}),
    (fastattn.layer_norm, (X, W), {"residual": R.half()}),
    (fastattn.layer_norm, (X, W, W, 1), {}),
    (fastattn.rms_norm, (X.to("meta"), W.to("meta")), {}),
    (fastattn.attention, QKV, {"causal": "top_left"}),
    (fastattn.attention, qkv(3, 7), {"causal": True}),
    (fastattn.attention, QKV, {"window": (1, 0)}),
    (fastattn.attention, QKV, {"softmax_scale": -0.5}),
    (fastattn.attention, QKV, {"softmax_scale": 0.0}),
    (fastattn.attention, QKV, {"softmax_scale": 1}),
    (fastattn.attention, QKV, {"return_lse": True}),
    (fastattn.attention, QKV, {"mask": torch.ones(5, 5, dtype=torch.bool)}),
    (fastattn.attention, (*QKV[:2], QKV[2][..., :3]), {}),
    (fastattn.ffn, (F1, W1, B1, W2, B2), {"recompute": True}),
    (fastattn.ffn, tuple(x.double() for x in (F1, W1, B1, W2, B2)), {}),
]


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: f"{call[0].__name__} {list(call[2])}")
def test_other_calls_are_described(call: Call, straight: list[bool]) -> None:
    function, arguments, options = call
    out, expected = function(*arguments, **options), described(call)
    assert not any(straight)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


ERRORS: list[Call] = [
    (fastattn.layer_norm, (X.int(), W.int()), {}),
    (fastattn.rms_norm, (X.to(torch.complex64),), {}),
    (fastattn.layer_norm, (X, W.to("meta")), {}),
    (fastattn.rms_norm, (X, W[:1]), {}),
    (fastattn.layer_norm, (X, W, W[:1]), {}),
    (fastattn.layer_norm, (X,), {"residual": R[:1]}),
    (fastattn.layer_norm, (X, W, W, torch.tensor(1e-5)), {}),
    (fastattn.rms_norm, (X, W, -1e-5), {}),
    (fastattn.rms_norm, (X, W, float("nan")), {}),
    (fastattn.attention, QKV, {"softcap": torch.tensor(0.0)}),
    (fastattn.attention, QKV, {"softmax_scale": float("inf")}),
    (fastattn.attention, QKV, {"causal": 2}),
    (fastattn.attention, QKV, {"fp32_precision": "tf32"}),
    (fastattn.attention, (QKV[0], *qkv(heads=2, kv_heads=3)[1:]), {}),
    (fastattn.attention, (QKV[0], QKV[1][:1], QKV[2][:1]), {}),
    (fastattn.attention, (*QKV[:2], QKV[2][:, :1]), {}),
    (fastattn.attention, (QKV[0], QKV[1].half(), QKV[2].half()), {}),
    (fastattn.attention, (*QKV[:2], QKV[2].to("meta")), {}),
    (fastattn.attention, tuple(x[0] for x in QKV), {}),
    (fastattn.attention, (None, *QKV[1:]), {}),
    (fastattn.ffn, (F1, W1, B1[:1], W2, B2), {}),
    (fastattn.ffn, (F1, W1, B1, W2, rand(1)), {}),
    (fastattn.ffn, (F1, W1, B1, W2.to("meta"), B2), {}),
    (fastattn.ffn, (F1, W1[0], None, W2, B2), {}),
    (fastattn.ffn, (F1, W1, B1, W2, B2, "tanh"), {}),
    (fastattn.ffn, (F1, W1, B1, W2, B2), {"layout": "conv"}),
    (fastattn.ffn, (F1, W1, B1, W2, B2), {"recompute": 0}),
]


@pytest.mark.parametrize("call", ERRORS, ids=lambda call: f"{call[0].__name__} {list(call[2])}")
def test_the_same_errors(call: Call) -> None:
    function, arguments, options = call
    with pytest.raises((TypeError, ValueError)) as expected:
        described(call)
    with pytest.raises(expected.type) as ours:
        function(*arguments, **options)
    assert str(ours.value) == str(expected.value)
    assert ours.value.__context__ is None


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_whoever_chooses_is_asked(
    function: Callable[..., Any], straight: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        fastattn.attention: QKV, fastattn.ffn: (F1, W1, B1, W2, B2),
        fastattn.layer_norm: (X, W), fastattn.rms_norm: (X, W),
    }[function]  # fmt: skip
    function(*arguments)
    assert straight == [True]
    function(*arguments, backend="reference")
    with fastattn.use_backend("reference"):
        function(*arguments)
    with monkeypatch.context() as patched:
        patched.setenv("FASTATTN_BACKEND", "reference")
        function(*arguments)
    assert not any(straight[1:])
    function(*arguments)
    assert straight[-1]


@pytest.mark.parametrize("function", [fastattn.attention, fastattn.ffn])
def test_modes_are_described(function: Callable[..., Any], straight: list[bool]) -> None:
    arguments = QKV if function is fastattn.attention else (F1, W1, B1, W2, B2)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*arguments).dtype == torch.bfloat16
    torch.func.jvp(lambda x: function(x, *arguments[1:]), arguments[:1], arguments[:1])
    torch.func.vmap(lambda x: function(x, *arguments[1:]))(torch.stack([arguments[0]] * 2))
    with torch.autograd.forward_ad.dual_level():
        function(*arguments)
    assert len(straight) == 4 and not any(straight)
