"""The boundary of cross_entropy: errors, dispatch, registration, and the ways torch can look through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.cross_entropy.cases import OPTIONS

import fastattn
from fastattn.ops.cross_entropy import IGNORED, aten

BACKENDS = ("reference", "torch", "triton")
X = torch.randn(2, 3, 8)
T = torch.randint(8, (2, 3))
W = torch.rand(8)


@pytest.mark.parametrize(
    ("x", "targets", "options", "error", "message"),
    [
        ([1.0], T, {}, TypeError, "logits must be a torch.Tensor; got list"),
        (X.int(), T, {}, TypeError, "logits must have one of the dtypes float16, .* got int32"),
        (X.to_sparse(), T, {}, TypeError, "logits must be a dense tensor"),
        (torch.nested.nested_tensor([X[0]]), T, {}, TypeError, "logits is a nested tensor"),
        (torch.tensor(1.0), T, {}, ValueError, r"logits must have the shape \(..., V\) with at least one class; got \(\)"),
        (X[..., :0], T, {}, ValueError, r"with at least one class; got \(2, 3, 0\)"),
        (X, [1], {}, TypeError, "targets must be a torch.Tensor; got list"),
        (X, X, {}, TypeError, "targets must be classes, .* for probabilities call torch.nn.functional"),
        (X, T.short(), {}, TypeError, r"targets must be int64 or int32; got int16: call targets.long\(\)"),
        (X, T.bool(), {}, TypeError, "targets must be int64 or int32; got bool"),
        (X, T[0], {}, ValueError, r"targets must have the shape \(2, 3\) of logits \(2, 3, 8\) without .* got \(3,\)"),
        (X, T.to("meta"), {}, ValueError, "targets must be on the device of logits, cpu; got meta"),
        (X, T, {"weight": W[:7]}, ValueError, r"weight must have the shape \(V,\) = \(8,\).* got \(7,\)"),
        (X, T, {"weight": W.long()}, TypeError, "weight must have one of the dtypes"),
        (X, T, {"weight": 1.0}, TypeError, "weight must be a torch.Tensor; got float"),
        (X, T, {"weight": W.to("meta")}, ValueError, "weight must be on the device of logits, cpu; got meta"),
        (X, T, {"weight": W.clone().requires_grad_()}, ValueError, r"no gradient here: give weight.detach\(\)"),
        (X, T, {"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'; got 'batchmean'"),
        (X, T, {"ignore_index": 1.5}, TypeError, "ignore_index must be an int; got float"),
        (X, T, {"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1; got 1.5"),
        (X, T, {"label_smoothing": "0"}, TypeError, "label_smoothing must be a float; got str"),
        (X, T, {"z_loss": -1.0}, ValueError, "z_loss must not be negative; got -1.0"),
        (X, T, {"z_loss": torch.tensor(1.0)}, TypeError, "z_loss must be a float; got Tensor"),
        (X, T, {"softcap": -30.0}, ValueError, "softcap must not be negative; got -30.0"),
        (X, T, {"softcap": None}, TypeError, "softcap must be a float; got NoneType"),
        (X, T, {"logit_scale": float("nan")}, ValueError, "logit_scale must be finite; got nan"),
        (X, T, {"logit_scale": float("inf")}, ValueError, "logit_scale must be finite; got inf"),
        (X, T, {"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_errors(
    x: Any, targets: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for _ in range(2):  # an error is not forgotten by the cache of plans
        with pytest.raises(error, match=message):
            fastattn.cross_entropy(x, targets, **options)


def test_what_the_kernels_decline() -> None:
    with pytest.raises(fastattn.UnsupportedError, match="float64"):
        fastattn.cross_entropy(X.double(), T, backend="triton")
    with pytest.raises(fastattn.UnsupportedError, match="cross_entropy has no cuda backend"):
        fastattn.cross_entropy(X, T, backend="cuda")
    fastattn.cross_entropy(X.double(), T)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = fastattn.explain(fastattn.cross_entropy, X.half(), T, weight=W, z_loss=1e-4)
    assert capsys.readouterr().out.strip() == str(explanation)
    assert explanation.backend == "torch"
    assert explanation.problem == (
        "logits (2, 3, 8) float16, weight float32, reduction mean, z_loss 0.0001, on cpu"
    )
    assert explanation.reasons["cuda"] == "not in this op"


def test_no_plan_is_taken_for_another() -> None:
    for _ in range(2):
        for options in OPTIONS.values():
            for weight in (None, W):
                ours = fastattn.cross_entropy(X, T, weight=weight, **options)
                reference = fastattn.cross_entropy(
                    X, T, weight=weight, backend="reference", **options
                )
                torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    """The loss is float32 whatever autocast wants of products."""
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            loss = fastattn.cross_entropy(X.to(dtype), T, backend=backend)
            assert loss.dtype == torch.float32
            expected = F.cross_entropy(X.to(dtype).flatten(0, 1), T.flatten())
            torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=1e-2)


SETTINGS = (IGNORED, 0.1, 1e-3, 0.5, 5.0)


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("weight", (None, W))
def test_opcheck(weight: torch.Tensor | None, backend: str) -> None:
    settings = (*SETTINGS, backend, True)
    op = torch.ops.fastattn.cross_entropy
    x = X.clone().requires_grad_()
    laws.opcheck(op, x, T, weight, *settings)
    with torch.no_grad():
        losses, statistics = op(X, T, weight, *settings)
    arguments = (torch.rand_like(losses), X, T, weight, statistics, *settings)
    laws.opcheck(torch.ops.fastattn.cross_entropy_backward, *arguments)


def test_per_row_gradients_in_one_batch() -> None:
    """is_grads_batched runs the backward under vmap."""
    x = X.flatten(0, 1).clone().requires_grad_()
    losses = fastattn.cross_entropy(x, T.flatten(), reduction="none")
    (rows,) = torch.autograd.grad(losses, x, torch.eye(6), is_grads_batched=True)
    off_diagonal = rows.masked_fill(torch.eye(6, dtype=torch.bool)[..., None], 0.0)
    assert (off_diagonal == 0).all() and rows.abs().sum() > 0


@pytest.mark.parametrize("large", (False, True))
def test_under_deterministic_algorithms(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "LARGE", 1 if large else 1 << 20)
    torch.use_deterministic_algorithms(True)
    try:
        x = X.clone().requires_grad_()
        torch.autograd.grad(fastattn.cross_entropy(x, T, backend="torch"), x)
    finally:
        torch.use_deterministic_algorithms(False)
