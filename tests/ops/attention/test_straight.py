"""The straight way of plain calls on a CPU: the same bits and errors as the described way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import laws
from torch import Tensor

import fastattn
from fastattn.backends import explanation_of
from fastattn.ops.attention import straight as module
from fastattn.ops.common.plain import DTYPES

Call = tuple[tuple[Any, ...], dict[str, Any]]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return laws.went_straight(module, monkeypatch)


def described(call: Call) -> Any:
    """The result on the long way, which a call that names its backend takes."""
    arguments, options = call
    return fastattn.attention(*arguments, **options, backend="torch")


def qkv(
    seqlen_q: int = 5, seqlen_k: int = 5, heads: int = 4, kv_heads: int = 4, dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = ((2, seqlen_q, heads, dim), *[(2, seqlen_k, kv_heads, dim)] * 2)
    return tuple(rand(*shape, dtype=dtype) for shape in shapes)


def plain_calls(dtype: torch.dtype) -> list[Call]:
    return [
        (qkv(dtype=dtype), {}),
        (qkv(dtype=dtype), {"causal": True}),
        (qkv(5, 9, dtype=dtype), {"softmax_scale": 0.3}),
        (qkv(1, 9, 4, 2, dtype=dtype), {"causal": True}),
        (qkv(4, 4, 4, 1, dtype=dtype), {"causal": True}),
        (qkv(1, 1, dtype=dtype), {"causal": True, "deterministic": False}),
    ]


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("grad", ["none", "all", "one", "forbidden"])
def test_the_same_bits(dtype: torch.dtype, grad: str, straight: list[bool]) -> None:
    """Of the results, and of the gradients of all inputs or only of the last one."""
    for call in plain_calls(dtype):
        arguments, options = call
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        for x in tensors if grad in ("all", "forbidden") else tensors[-1:] * (grad == "one"):
            x.requires_grad_()
        with torch.set_grad_enabled(grad != "forbidden"):
            out, expected = fastattn.attention(*arguments, **options), described(call)
        assert straight.pop() and not straight
        assert explanation_of(fastattn.attention, *arguments, **options).backend == "torch"
        outs = (out, expected) if isinstance(out, tuple) else ((out,), (expected,))
        for ours, theirs in zip(*outs, strict=True):
            assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
            assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad
        if grad in ("all", "one"):
            wanted = [x for x in tensors if x.requires_grad]
            grads = (torch.autograd.grad(o[0].sum(), wanted, allow_unused=True) for o in outs)
            for ours, theirs in zip(*grads, strict=True):
                assert ours is theirs is None or torch.equal(ours, theirs)


QKV = qkv()

# What ATen would take, or take in another sense, and what only the long way can.
OTHERS: list[Call] = [
    (QKV, {"causal": "top_left"}),
    (qkv(3, 7), {"causal": True}),
    (QKV, {"window": (1, 0)}),
    (QKV, {"softmax_scale": -0.5}),
    (QKV, {"softmax_scale": 0.0}),
    (QKV, {"softmax_scale": 1}),
    (QKV, {"return_lse": True}),
    (QKV, {"mask": torch.ones(5, 5, dtype=torch.bool)}),
    ((*QKV[:2], QKV[2][..., :3]), {}),
]


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: str(list(call[1])))
def test_other_calls_are_described(call: Call, straight: list[bool]) -> None:
    arguments, options = call
    out, expected = fastattn.attention(*arguments, **options), described(call)
    assert not any(straight)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


ERRORS: list[Call] = [
    (QKV, {"softcap": torch.tensor(0.0)}),
    (QKV, {"softmax_scale": float("inf")}),
    (QKV, {"causal": 2}),
    (QKV, {"fp32_precision": "tf32"}),
    (QKV, {"deterministic": None}),
    ((QKV[0], *qkv(heads=2, kv_heads=3)[1:]), {}),
    ((QKV[0], QKV[1][:1], QKV[2][:1]), {}),
    ((*QKV[:2], QKV[2][:, :1]), {}),
    ((QKV[0], QKV[1].half(), QKV[2].half()), {}),
    ((*QKV[:2], QKV[2].to("meta")), {}),
    (tuple(x[0] for x in QKV), {}),
    ((None, *QKV[1:]), {}),
]


@pytest.mark.parametrize("call", ERRORS, ids=lambda call: str(list(call[1])))
def test_the_same_errors(call: Call) -> None:
    arguments, options = call
    with pytest.raises((TypeError, ValueError)) as expected:
        described(call)
    with pytest.raises(expected.type) as ours:
        fastattn.attention(*arguments, **options)
    assert str(ours.value) == str(expected.value)
    assert ours.value.__context__ is None


def test_whoever_chooses_is_asked(straight: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = QKV
    fastattn.attention(*arguments)
    assert straight == [True]
    fastattn.attention(*arguments, backend="reference")
    with fastattn.use_backend("reference"):
        fastattn.attention(*arguments)
    with monkeypatch.context() as patched:
        patched.setenv("FASTATTN_BACKEND", "reference")
        fastattn.attention(*arguments)
    assert not any(straight[1:])
    fastattn.attention(*arguments)
    assert straight[-1]


def test_modes_are_described(straight: list[bool]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(*QKV).dtype == torch.bfloat16
    torch.func.jvp(lambda x: fastattn.attention(x, *QKV[1:]), QKV[:1], QKV[:1])
    torch.func.vmap(lambda x: fastattn.attention(x, *QKV[1:]))(torch.stack([QKV[0]] * 2))
    with torch.autograd.forward_ad.dual_level():
        fastattn.attention(*QKV)
    assert len(straight) == 4 and not any(straight)
