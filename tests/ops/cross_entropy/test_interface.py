"""The boundary of cross_entropy: errors, dispatch, registration, and the ways torch can look through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.cross_entropy.cases import OPTIONS
from torch.autograd import forward_ad

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("large", (False, True))
@pytest.mark.parametrize("wrong", (8, -1, -101))
def test_targets_that_are_no_class(
    wrong: int, large: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a plan is there already, and where F.cross_entropy is who finds out."""
    monkeypatch.setattr(aten, "LARGE", 1 if large else 1 << 20)
    fastattn.cross_entropy(X, T, backend=backend)
    targets = T.clone()
    targets[1, 1] = wrong
    with pytest.raises(IndexError, match=str(wrong)):
        fastattn.cross_entropy(X, targets, backend=backend)
    fastattn.cross_entropy(X, targets, ignore_index=wrong, backend=backend)


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


def test_meta_tensors() -> None:
    loss = fastattn.cross_entropy(X.to("meta"), T.to("meta"), reduction="none")
    assert loss.shape == T.shape and loss.device.type == "meta"


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


@pytest.mark.parametrize("name", ("plain", "none", "everything", "everything, mean"))
@pytest.mark.parametrize("large", (False, True))
def test_derivatives(large: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the second, of both ways of the torch backend."""
    monkeypatch.setattr(aten, "LARGE", 1 if large else 1 << 20)
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 0, IGNORED, 1])
    weight = torch.rand(5, dtype=torch.float64)

    def function(logits: torch.Tensor) -> torch.Tensor:
        return fastattn.cross_entropy(
            logits, targets, weight=weight, backend="torch", **OPTIONS[name]
        )

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_second_derivative_of_the_kernels() -> None:
    def second(backend: str) -> torch.Tensor:
        x = X.clone().requires_grad_()
        loss = fastattn.cross_entropy(x, T, backend=backend, **OPTIONS["everything, mean"])
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(second("triton"), second("reference"))


def test_transforms() -> None:
    """Left to themselves they find a differentiable backend; a kernel that is named says no."""
    tangent = torch.randn_like(X)

    def loss(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return fastattn.cross_entropy(x, T, **options)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.flatten(0, 1), T.flatten())

    torch.testing.assert_close(torch.func.grad(loss)(X), torch.func.grad(plain)(X))
    for ours, theirs in zip(
        torch.func.jvp(loss, (X,), (tangent,)), torch.func.jvp(plain, (X,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    each = torch.func.vmap(torch.func.grad(lambda x, t: fastattn.cross_entropy(x, t)))(X, T)
    single = torch.func.grad(lambda x: F.cross_entropy(x, T[1]))(X[1])
    torch.testing.assert_close(each[1], single)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, tangent)
        assert forward_ad.unpack_dual(loss(dual)).tangent is not None
    with pytest.raises(fastattn.UnsupportedError, match="transforms"):
        torch.func.grad(lambda x: loss(x, backend="triton"))(X)


def test_per_row_gradients_in_one_batch() -> None:
    """is_grads_batched runs the backward under vmap."""
    x = X.flatten(0, 1).clone().requires_grad_()
    losses = fastattn.cross_entropy(x, T.flatten(), reduction="none")
    (rows,) = torch.autograd.grad(losses, x, torch.eye(6), is_grads_batched=True)
    off_diagonal = rows.masked_fill(torch.eye(6, dtype=torch.bool)[..., None], 0.0)
    assert (off_diagonal == 0).all() and rows.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str) -> None:
    def step(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return fastattn.cross_entropy(x, targets, label_smoothing=0.1, backend=backend)

    def draw(rows: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(rows, 8, requires_grad=True), torch.randint(8, (rows,))

    laws.one_graph(step, draw, frames=None)


@pytest.mark.parametrize("large", (False, True))
def test_under_deterministic_algorithms(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "LARGE", 1 if large else 1 << 20)
    torch.use_deterministic_algorithms(True)
    try:
        x = X.clone().requires_grad_()
        torch.autograd.grad(fastattn.cross_entropy(x, T, backend="torch"), x)
    finally:
        torch.use_deterministic_algorithms(False)
