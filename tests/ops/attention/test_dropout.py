"""Dropout of the softmax's weights: the share that is kept, one mask in both directions."""

from __future__ import annotations

import pytest
import torch
from ops.backends import widest

import fastattn


@pytest.mark.parametrize("backend", ("reference", "torch", "triton"))
@pytest.mark.parametrize("p", (0.25, 0.9))
def test_uniform_weights(p: float, backend: str, device: str) -> None:
    """Keeps the mean, drops the stated share, scales the rest; one mask in forward and backward."""
    q = torch.zeros(1, 64, 2, 16, device=device, requires_grad=True)
    k = torch.zeros(1, 128, 2, 16, device=device)
    v = torch.ones(1, 128, 2, 16, device=device, requires_grad=True)
    out = fastattn.attention(q, k, v, dropout_p=p, backend=backend)
    kept = out.detach() * (1 - p) * 128  # uniform softmax: the number of kept keys
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-2)
    assert abs(kept.mean().item() / 128 - (1 - p)) < 0.02
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv.sum(), out.sum())


@pytest.mark.parametrize("backend", ("reference", "triton", "cuda"))
def test_the_lse_is_that_of_all_weights(backend: str, device: str) -> None:
    q = torch.randn(1, 20, 2, 16, device=device).to(widest(backend))
    _, lse = fastattn.attention(q, q, q, dropout_p=0.5, return_lse=True, backend=backend)
    _, whole = fastattn.attention(q, q, q, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, whole)
