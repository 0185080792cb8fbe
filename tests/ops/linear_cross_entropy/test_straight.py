"""A plain loss of few logits on a CPU goes to ATen undescribed: the same bits, the same errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops import laws

import fastattn
from fastattn.ops.linear_cross_entropy import straight

X, W, B = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(11)
T = torch.tensor([[1, 10, 0], [-100, 4, 4]])

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")


@pytest.fixture(autouse=True)
def few(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo `small`: a few logits are few."""
    monkeypatch.setattr(straight.aten, "LARGE", 1 << 10)


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return laws.went_straight(straight, monkeypatch)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_same_bits(reduction: str, went: list[bool]) -> None:
    for x, targets, bias in ((X, T, B), (X[0], T[0], None), (X[0, 0], T[0, 0], B), (X, 0 * T, B)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, W, bias)]
        wanted = [t for t in leaves if t is not None]
        results = []
        for backend in (None, "torch"):  # a call that names its backend takes the long way
            out = fastattn.linear_cross_entropy(
                leaves[0], leaves[1], targets, leaves[2], reduction=reduction, backend=backend
            )
            results.append([out, *torch.autograd.grad(out.sum(), wanted)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert went == [True] * 4


def test_who_takes_the_long_way(went: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = fastattn.linear_cross_entropy
    for call in (
        lambda: loss(X.double(), W.double(), T),
        lambda: loss(X.half(), W.half(), T),  # the scores are float32
        lambda: loss(X, W, T.int()),
        lambda: loss(X[:0], W, T[:0]),
        lambda: torch.func.grad(lambda w: loss(X, w, T))(W),
    ):
        call()
    with torch.autocast("cpu", torch.bfloat16):
        loss(X, W, T)
    monkeypatch.setattr(straight.aten, "LARGE", 6 * 11)
    loss(X, W, T)
    assert went == [False] * 7


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(X, W, T + 20), IndexError, "out of bounds"),
        (lambda f: f(X, W, T[:1]), ValueError, "targets must"),
        (lambda f: f(X, W[:, :4], T), ValueError, "weight must"),
        (lambda f: f(X, W, T, B[:3]), ValueError, "bias must"),
        (lambda f: f(X, W, T, reduction="median"), ValueError, "reduction must"),
        (lambda f: f(X, W, T, ignore_index=1.5), TypeError, "ignore_index"),
    ],
)
def test_errors_are_those_of_the_long_way(
    call: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(fastattn.linear_cross_entropy)
