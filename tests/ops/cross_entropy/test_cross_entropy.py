"""cross_entropy against the formula in float64, on every backend."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from ops.cross_entropy.cases import (
    BF16,
    DOUBLE,
    FLOAT,
    HALF,
    OPTIONS,
    Case,
    check,
    outputs_and_gradients,
)

import fastattn
from fastattn.ops.cross_entropy import IGNORED, aten, tiles

BACKENDS = ("reference", "torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, weighted: bool, backend: str, device: str) -> None:
    check(Case((9,), 13, weighted=weighted, options=OPTIONS[name], device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (HALF, BF16, DOUBLE))
@pytest.mark.parametrize("name", ("plain", "everything"))
def test_dtypes(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    if (backend, dtype) == ("triton", DOUBLE):
        pytest.skip("its kernels compute in float32")
    check(
        Case((2, 5), 40, dtype=dtype, weighted=True, options=OPTIONS[name], device=device), backend
    )


SHAPES = [
    ((), 5),  # one row
    ((1,), 7),
    ((3,), 1),  # one class: the loss is 0
    ((2, 3, 2), 11),
    ((5,), 4099),  # several blocks of the kernels, the last not full
    ((70,), 33),  # several rows a program, the last not full
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "classes"), SHAPES)
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_shapes(
    reduction: str, shape: tuple[int, ...], classes: int, backend: str, device: str
) -> None:
    check(Case(shape, classes, ignored=0, options={"reduction": reduction}, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("plain", "label_smoothing", "z_loss"))
@pytest.mark.parametrize("offset", (-1000.0, 1000.0))
def test_logits_far_from_zero(offset: float, name: str, backend: str, device: str) -> None:
    """The digits that the maximum has do not cost those of the differences."""
    check(Case((20,), 50, offset=offset, options=OPTIONS[name], device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty(shape: tuple[int, ...], reduction: str, backend: str, device: str) -> None:
    logits = torch.randn(*shape, 5, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64, device=device)
    loss = fastattn.cross_entropy(logits, targets, reduction=reduction, backend=backend)
    expected = F.cross_entropy(logits.reshape(-1, 5), targets.reshape(-1), reduction=reduction)
    torch.testing.assert_close(loss, expected.view(loss.shape), equal_nan=True)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.shape == logits.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("name", ("plain", "everything"))
def test_no_target_counts(name: str, reduction: str, backend: str, device: str) -> None:
    """As F.cross_entropy: the mean is 0 / 0, and the gradients are 0."""
    options = OPTIONS[name] | {"reduction": reduction}
    case = Case((4,), 6, ignored=1.0, options=options, device=device)
    shape = (4,) if reduction == "none" else ()
    ours = outputs_and_gradients(case.ours(backend), case.inputs(), torch.ones(shape))
    assert ours["loss"].isnan().all() if reduction == "mean" else (ours["loss"] == 0).all()
    assert (ours["dlogits"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_that_are_ruled_out(backend: str, device: str) -> None:
    """Logits of -inf: probability 0, gradient 0; also as the first block of a row."""
    case = Case((6,), 4100, ignored=0, device=device)
    logits, (targets, _) = case.inputs()["logits"], case.others()
    logits[:, :4098] = -torch.inf
    targets[:] = 4099
    logits.requires_grad_()
    loss = fastattn.cross_entropy(logits, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_stays_alone(backend: str, device: str) -> None:
    logits = torch.randn(6, 9, device=device)
    targets = torch.arange(6, device=device)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        losses = fastattn.cross_entropy(x, targets, reduction="none", backend=backend)
        return losses, torch.autograd.grad(losses.sum(), x)[0]

    clean = run(logits)
    bad = logits.clone()
    bad[1, 3], bad[4, 0] = torch.nan, torch.inf
    for good, result in zip(clean, run(bad), strict=True):
        assert torch.equal(good[[0, 2, 3, 5]], result[[0, 2, 3, 5]])
        assert result[1].isnan().any() and result[4].isnan().any()


def strided(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The (2, 6, 9) logits, laid out otherwise."""
    padded = logits.new_full((2, 7, 12), 5.0)
    padded[:, :-1, :9] = logits
    return {
        "shifted by one": padded[:, :-1, :9],
        "classes first": logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "tokens first": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "every second class": logits.repeat_interleave(2, -1)[..., ::2],
        "a row for all": logits[:1, :1].expand(2, 6, 9),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", strided(torch.zeros(2, 6, 9)))
def test_strides(name: str, backend: str, device: str) -> None:
    case = Case((2, 6), 9, options=OPTIONS["everything"], device=device)
    check(case, backend, {"logits": strided(case.inputs()["logits"])[name]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_targets_weights_and_gradients(backend: str, device: str) -> None:
    logits = torch.randn(4, 5, 6, device=device, requires_grad=True)
    targets = torch.randint(6, (5, 4), device=device).t()
    weight = torch.rand(12, device=device, dtype=torch.float64)[::2]
    upstream = torch.rand(5, 4, device=device).t()
    losses = fastattn.cross_entropy(
        logits, targets, weight=weight, reduction="none", backend=backend
    )
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), weight.float(), reduction="none"
    ).view(4, 5)
    torch.testing.assert_close(losses, expected)
    ours, theirs = (torch.autograd.grad(x, logits, upstream)[0] for x in (losses, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_targets(backend: str, device: str) -> None:
    check(Case((12,), 7, targets=torch.int32, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend: str, device: str) -> None:
    case = Case((33,), 300, weighted=True, options=OPTIONS["everything"], device=device)
    upstream = torch.rand(33)
    first, second = (
        outputs_and_gradients(case.ours(backend), case.inputs(), upstream) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_what_is_kept_for_the_backward(backend: str, device: str) -> None:
    """The logits themselves, in their dtype, and little a row."""
    logits = torch.randn(16, 500, device=device).to(HALF).requires_grad_()
    targets = torch.randint(500, (16,), device=device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastattn.cross_entropy(logits, targets, backend=backend)
    assert max(t.numel() for t in kept if t.data_ptr() != logits.data_ptr()) <= 2 * 16


def test_small_calls_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "LARGE", 1 << 22)
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    assert torch.equal(fastattn.cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_tiles_cover_every_row() -> None:
    for classes in (*range(1, 5000, 7), 50257, 131072, 1 << 18):
        for tile in (tiles.forward(classes), tiles.backward(classes)):
            assert tile.block & (tile.block - 1) == 0
            assert tile.rows * tile.block <= 32 * tile.num_warps * 32
            assert tile.block >= classes or tile.rows == 1


@pytest.mark.fuzz
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend: str, request: pytest.FixtureRequest, device: str) -> None:
    draws, seed = (request.config.getoption(name) for name in ("--draws", "--seed"))
    for number in range(seed, seed + draws // 3):
        check(drawn(number, device), backend)


def drawn(number: int, device: str) -> Case:
    """A problem with any options, of any size up to some dozens."""
    draw = random.Random(number)
    options = {
        "reduction": draw.choice(("none", "sum", "mean")),
        "label_smoothing": draw.choice((0.0, 0.0, 0.1, draw.random())),
        "z_loss": draw.choice((0.0, 1e-4, 0.1)),
        "logit_scale": draw.choice((1.0, 0.0625, 2.0)),
        "softcap": draw.choice((0.0, 0.0, 2.0, 30.0)),
        "ignore_index": draw.choice((IGNORED, -1, 0)),
    }
    rows = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 3)))
    classes = draw.choice((2, draw.randint(2, 90)))
    dtype = draw.choice((FLOAT, FLOAT, HALF))
    case = Case(
        rows, classes, dtype=dtype, weighted=draw.random() < 0.5, scale=draw.choice((0.1, 2.0)),
        ignored=draw.choice((0.0, 0.3)), options=options, device=device, seed=number,
    )  # fmt: skip
    targets, _ = case.others()
    if (targets == options["ignore_index"]).all():  # 0 / 0 has no error to compare
        return dataclasses.replace(case, options=options | {"reduction": "sum"})
    return case
