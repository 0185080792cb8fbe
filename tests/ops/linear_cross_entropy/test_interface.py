"""The boundary of linear_cross_entropy: errors, dispatch, registration, and how torch looks through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.ops.cross_entropy import IGNORED
from fastattn.ops.linear_cross_entropy import aten

BACKENDS = ("reference", "torch", "triton")
X = torch.randn(2, 3, 4)
WEIGHT = torch.randn(8, 4)
BIAS = torch.randn(8)
T = torch.randint(8, (2, 3))
C = torch.rand(8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor; got list"),
        ({"x": X.int()}, TypeError, "x must have one of the dtypes"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have the shape \(..., D\); got a tensor without dimensions"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor; got NoneType"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have the shape \(V, D\) with at least one class; got \(4,\)"),
        ({"weight": WEIGHT[:0]}, ValueError, r"at least one class; got \(0, 4\)"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"with D = 4, the last size of x \(2, 3, 4\); got \(8, 3\)"),
        ({"weight": WEIGHT.t()}, ValueError, r"got \(4, 8\); weight.t\(\) fits"),
        ({"weight": WEIGHT.half()}, TypeError, "must have one dtype; got x float32, weight float16: cast"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on the device of x, cpu; got meta"),
        ({"bias": BIAS[:7]}, ValueError, r"bias must have the shape \(V,\) = \(8,\), or be None; got \(7,\)"),
        ({"bias": BIAS.double()}, TypeError, "must have one dtype; got x float32, bias float64"),
        ({"targets": T[0]}, ValueError, r"targets must have the shape \(2, 3\) of x \(2, 3, 4\)"),
        ({"targets": T.float()}, TypeError, "targets must be classes"),
        ({"class_weight": C[:3]}, ValueError, r"class_weight must have the shape \(V,\) = \(8,\)"),
        ({"class_weight": C.clone().requires_grad_()}, ValueError, r"give class_weight.detach\(\)"),
        ({"reduction": None}, ValueError, "reduction must be one of"),
        ({"softcap": -1.0}, ValueError, "softcap must not be negative"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be from 0 to 1"),
    ],
)  # fmt: skip
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "targets": T} | changed
    for _ in range(2):
        with pytest.raises(error, match=message):
            fastattn.linear_cross_entropy(**arguments)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = fastattn.explain(
        fastattn.linear_cross_entropy, X, WEIGHT, T, BIAS, softcap=30.0, reduction="sum"
    )
    assert capsys.readouterr().out.strip() == str(explanation)
    assert explanation.backend == "torch"
    assert explanation.problem == (
        "x (2, 3, 4), 8 classes, float32, bias, reduction sum, softcap 30, on cpu"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", (False, True))
def test_autocast(chunks: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As F.linear and F.cross_entropy of float32, dtypes of gradients included."""
    monkeypatch.setattr(aten, "LARGE", 1 if chunks else 1 << 20)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    leaves = [t.clone().requires_grad_() for t in (X, WEIGHT, BIAS)]
    x, weight, bias = leaves

    def grads(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, leaves)

    with torch.autocast("cpu", dtype):
        ours = fastattn.linear_cross_entropy(x, weight, T, bias, backend=backend)
        logits = F.linear(x, weight, bias)
        eager = F.cross_entropy(logits.float().flatten(0, 1), T.flatten())
    assert ours.dtype == eager.dtype == torch.float32
    torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(grads(ours), grads(eager), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=2e-2)


def test_mixed_dtypes_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastattn.linear_cross_entropy(X.bfloat16(), WEIGHT, T, BIAS, backend="torch")
    assert loss.dtype == torch.float32


SETTINGS = (IGNORED, 0.1, 1e-3, 0.5, 5.0)


@pytest.mark.parametrize(
    ("backend", "keep"),
    [
        ("torch", (True, True, True)),
        ("torch", (False, True, False)),
        ("torch", (False, False, False)),
        ("triton", (True, True, True)),
        ("triton", (True, False, False)),
        ("triton", (False, False, False)),
    ],
)
@pytest.mark.parametrize("bias", (None, BIAS))
def test_opcheck(bias: torch.Tensor | None, backend: str, keep: tuple[bool, ...]) -> None:
    op = torch.ops.fastattn.linear_cross_entropy
    keep = (keep[0], keep[1], keep[2] and bias is not None)
    for summed in (True, False) if not any(keep) else (True,):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (X, WEIGHT, bias)]
        arguments = (*leaves, T, C, summed, keep, *SETTINGS, backend, True)
        laws.opcheck(op, *arguments)
    with torch.no_grad():
        losses, statistics, *_ = op(
            X, WEIGHT, bias, T, C, False, [False] * 3, *SETTINGS, backend, True
        )
    needs = (True, True, bias is not None)
    arguments = (losses, X, WEIGHT, bias, T, C, statistics, needs, *SETTINGS, backend, True)
    laws.opcheck(torch.ops.fastattn.linear_cross_entropy_backward, *arguments)


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(reentrant: bool, backend: str) -> None:
    leaves = [t.clone().requires_grad_() for t in (X, WEIGHT)]

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fastattn.linear_cross_entropy(x, weight, T, backend=backend)

    expected = torch.autograd.grad(run(*leaves), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    torch.testing.assert_close([x.grad for x in leaves], list(expected))


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_gradients_accumulate(backend: str) -> None:
    """Two losses of one weight, the second of which is scaled, into the same `.grad`."""
    weight = WEIGHT.clone().requires_grad_()
    (one,) = torch.autograd.grad(fastattn.linear_cross_entropy(X, weight, T), weight)
    kept = one.clone()
    for factor in (1.0, 2.0):
        (factor * fastattn.linear_cross_entropy(X, weight, T, backend=backend)).backward()
    torch.testing.assert_close(weight.grad, 3 * kept)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bool, ...]] = []
    sweep = aten._sweep
    monkeypatch.setattr(aten, "_sweep", lambda *a: made.append(tuple(a[-1])) or sweep(*a))
    weight = WEIGHT.clone().requires_grad_()
    with torch.no_grad():
        fastattn.linear_cross_entropy(X, weight, T, backend="torch")
    fastattn.linear_cross_entropy(X, WEIGHT, T, backend="torch")
    fastattn.linear_cross_entropy(X, weight, T, backend="torch")
    assert made == [(False, False, False), (False, False, False), (False, True, False)]
