"""Against F.cross_entropy; that the model has it right is tested with GPT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastattn.ops.cross_entropy import IGNORED, cross_entropy, interface


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few logits count as many, in chunks of two rows."""
    monkeypatch.setattr(interface, "LARGE", 1)
    monkeypatch.setattr(interface, "CHUNK", 2 * 11)


def _given(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (30 * torch.randn(7, 11)).to(dtype).requires_grad_()
    return logits, torch.tensor([3, 0, IGNORED, 10, 5, 5, IGNORED])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_value_and_gradient(dtype: torch.dtype) -> None:
    logits, targets = _given(dtype)
    value = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(3 * x, logits)[0] for x in (value, expected)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


def test_a_class_that_is_ruled_out() -> None:
    logits, targets = _given()
    masked = logits.detach().index_fill(1, torch.tensor([1, 2]), -torch.inf).requires_grad_()
    value = cross_entropy(masked, targets)
    torch.testing.assert_close(value, F.cross_entropy(masked, targets, ignore_index=IGNORED))
    assert torch.autograd.grad(value, masked)[0].isfinite().all()


def test_no_target_counts() -> None:
    logits, targets = _given()
    value = cross_entropy(logits, torch.full_like(targets, IGNORED))
    assert value.isnan()
    assert (torch.autograd.grad(value, logits)[0] == 0).all()


def test_derivatives() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 0, IGNORED, 1, 1])

    def function(logits: torch.Tensor) -> torch.Tensor:
        return interface._CrossEntropy.apply(logits, targets)

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_under_transforms() -> None:
    logits, targets = _given()
    expected = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    torch.testing.assert_close(torch.func.grad(cross_entropy)(logits.detach(), targets), expected)
