"""cross_entropy against the formula in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.cross_entropy.cases import HALF, OPTIONS, Case, check

import fastattn
from fastattn.ops.cross_entropy import aten, tiles

BACKENDS = ("reference", "torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("plain", "label_smoothing", "z_loss"))
@pytest.mark.parametrize("offset", (-1000.0, 1000.0))
def test_logits_far_from_zero(offset: float, name: str, backend: str, device: str) -> None:
    """The digits that the maximum has do not cost those of the differences."""
    check(Case((20,), 50, offset=offset, options=OPTIONS[name], device=device), backend)


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


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_what_is_kept_for_the_backward(backend: str, device: str) -> None:
    """The logits themselves, in their dtype, and little a row."""
    logits = torch.randn(16, 500, device=device).to(HALF).requires_grad_()
    targets = torch.randint(500, (16,), device=device)
    kept = laws.kept(lambda: fastattn.cross_entropy(logits, targets, backend=backend))
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
