"""linear_cross_entropy against the formula in float64, on every backend."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.backends import assert_near
from ops.cross_entropy.cases import (
    BF16,
    FLOAT,
    HALF,
    OPTIONS,
    Case,
    check,
    outputs_and_gradients,
)

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.cross_entropy import IGNORED
from fastattn.ops.linear_cross_entropy import aten, tiles

BACKENDS = ("reference", "torch", "triton", "gluon")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("label_smoothing", "z_loss"))
def test_the_classes_in_several_parts(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The parts of a row are joined with their sums of label smoothing."""
    monkeypatch.setattr(tiles, "splits", lambda *_: 3)
    options = OPTIONS[name] | {"reduction": "none"}
    case = Case((9,), 300, 16, bias=True, weighted=True, options=options, device=device)
    check(case.on(backend), backend)


def strided(case: Case) -> dict[str, dict[str, torch.Tensor]]:
    """The case's inputs, laid out otherwise."""
    x, weight, bias = case.inputs().values()
    return {
        "x shifted by one": {"x": torch.cat([x, x[:, :1]], 1)[:, :-1]},
        "x transposed": {"x": x.transpose(0, 1).contiguous().transpose(0, 1)},
        "x features first": {"x": x.permute(2, 0, 1).contiguous().permute(1, 2, 0)},
        "weight transposed": {"weight": weight.t().contiguous().t()},
        "every second of weight": {"weight": weight.repeat_interleave(2, 1)[:, ::2]},
        "rows of a larger weight": {"weight": torch.cat([weight, weight], 1)[:, : weight.shape[1]]},
        "every second of bias": {"bias": bias.repeat_interleave(2)[::2]},
        "one bias for all": {"bias": bias[:1].expand(bias.shape)},
    }


STRIDED = Case((2, 6), 9, 16, bias=True, options=OPTIONS["everything, mean"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", strided(STRIDED))
def test_strides(name: str, backend: str, device: str) -> None:
    case = dataclasses.replace(STRIDED, device=device).on(backend)
    check(case, backend, case.inputs() | strided(case)[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")])
@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_gradients_of_some_inputs_only(
    reduction: str, wanted: tuple[str, ...], backend: str, device: str
) -> None:
    case = Case((20,), 9, 6, bias=True, options={"reduction": reduction}, device=device).on(backend)

    def grads(run: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.to(dtype).requires_grad_(n in wanted) for n, x in case.inputs().items()}
        return torch.autograd.grad(run(**leaves).sum(), [leaves[n] for n in wanted])

    for ours, exact in zip(grads(case.ours(backend), case.dtype), grads(case.eager, FLOAT)):
        assert_near(ours, exact)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [*itertools.product((FLOAT, HALF), ("torch", "triton")), (HALF, "gluon"), (BF16, "gluon")],
)
def test_backward_twice(dtype: torch.dtype, backend: str, device: str) -> None:
    """The first backward gives the forward's gradients away; the second makes the same again."""
    case = Case((30,), 11, 8, dtype=dtype, device=device)
    leaves = {name: x.requires_grad_() for name, x in case.inputs().items()}
    loss = case.ours(backend)(**leaves)
    first = torch.autograd.grad(loss, [*leaves.values()], torch.tensor(3.0), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, [*leaves.values()], torch.tensor(3.0))
    for before, x, y in zip(kept, first, second, strict=True):
        assert torch.equal(before, x) and torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (HALF, BF16))
def test_sums_of_many_chunks(dtype: torch.dtype, backend: str, device: str) -> None:
    """16-bit products of several chunks are added in float32."""
    if backend == "triton" and dtype == BF16 and triton_runs() == "interpreted":
        pytest.skip("it declines bfloat16")
    assert tiles.rows_at_once(900, 7, 8, dtype.itemsize) == tiles.ROWS
    for reduction in ("mean", "none"):
        options = {"reduction": reduction}
        case = Case((900,), 7, 3, dtype=dtype, bias=True, options=options, device=device)
        check(case.on(backend), backend)


@pytest.mark.parametrize("backend", ("torch", "triton", "gluon"))
@pytest.mark.parametrize("chunks", (False, True))
def test_sums_beyond_float16(
    chunks: bool, backend: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The gradient of a mean over many rows of one class is finite; that of their sum is not."""
    for module in () if chunks else (aten, tiles):
        monkeypatch.setattr(module, "CHUNK", 1 << 20)
    x = torch.full((1500, 8), 64.0, dtype=HALF, device=device, requires_grad=True)
    weight = torch.zeros(5, 8, dtype=HALF, device=device, requires_grad=True)
    targets = torch.ones(1500, dtype=torch.int64, device=device)
    loss = fastattn.linear_cross_entropy(x, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss, weight)
    expected = torch.full((5, 8), 64 / 5, dtype=HALF)
    expected[1] = -64 * 4 / 5
    torch.testing.assert_close(grad.cpu(), expected)


@pytest.mark.parametrize(
    ("rows", "classes", "features", "itemsize", "expected"),
    [
        (8192, 131072, 4096, 2, 8192),  # as much memory as summing in float32 would take
        (32768, 131072, 4096, 2, 8192),
        (8192, 131072, 4096, 4, 2048),
        (6000, 131072, 1024, 4, 2048),  # three of one size
        (4100, 131072, 1024, 4, 1408),
        (1, 10, 10, 2, 1),
        (0, 10, 10, 2, 1),
        (300, 1 << 30, 10, 4, 128),
    ],
)
def test_rows_at_once(
    rows: int, classes: int, features: int, itemsize: int, expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tiles, "CHUNK", 1 << 28)
    assert tiles.rows_at_once(rows, classes, features, itemsize) == expected


def test_rows_that_do_not_count_may_hold_anything() -> None:
    """The torch backend leaves them out of its products."""
    case = Case((30,), 11, 8, bias=True)
    inputs, (targets, _) = case.inputs(), case.others()
    clean = outputs_and_gradients(case.ours("torch"), inputs, torch.tensor(1.0))
    inputs["x"][targets == IGNORED] = torch.nan
    for name, value in outputs_and_gradients(case.ours("torch"), inputs, torch.tensor(1.0)).items():
        assert torch.equal(value, clean[name]), name


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes(call: Any) -> int:
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    try:
        from counting import peak_bytes
    finally:
        sys.path.pop(0)
    return peak_bytes(call, "cpu")


@pytest.fixture
def as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend's own sizes, but for the chunk, of 1/64 of the logits below."""
    from fastattn.ops.cross_entropy import aten as of_logits

    monkeypatch.setattr(of_logits, "BLOCK", 1 << 15)
    monkeypatch.setattr(aten, "CHUNK", (1 << 23) // 64)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_memory(as_ever: None, reduction: str) -> None:
    """At most a tenth of eager's, in the proportions of 8192 tokens and 131072 classes."""
    n, classes, features = 1024, 8192, 32
    x, weight = torch.randn(n, features, requires_grad=True), torch.randn(classes, features)
    targets = torch.randint(classes, (n,))
    weight.requires_grad_()

    def ours() -> object:
        loss = fastattn.linear_cross_entropy(x, weight, targets, reduction=reduction)
        return torch.autograd.grad(loss.sum(), (x, weight))

    def eager() -> object:
        loss = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
        return torch.autograd.grad(loss.sum(), (x, weight))

    ours(), eager()
    assert peak_bytes(ours) <= peak_bytes(eager) / 10


def test_the_gradient_of_the_weight_is_one_buffer(as_ever: None) -> None:
    """It becomes `.grad` without a copy, and an embedding's is added to it in place."""
    classes, features = 4096, 64
    weight = torch.randn(classes, features, requires_grad=True)
    ids = torch.randint(classes, (256,))
    size = weight.numel() * 4

    def head() -> None:
        weight.grad = None
        x = torch.randn(256, features)
        fastattn.linear_cross_entropy(x, weight, ids, backend="torch").backward()

    def tied() -> None:
        weight.grad = None
        fastattn.linear_cross_entropy(F.embedding(ids, weight), weight, ids).backward()

    chunk = 2 * 4 * aten.CHUNK + (1 << 19)
    head()
    assert peak_bytes(head) < size + chunk
    assert peak_bytes(tied) < 2 * size + chunk  # torch makes the embedding's
