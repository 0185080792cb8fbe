"""The norms' dropout: which elements it drops, on every backend, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.layer_norm.cases import Case
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.ops.common import dropout

BACKENDS = ("reference", "torch", "triton")
NORMS = (fastattn.layer_norm, fastattn.rms_norm)
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def dropped_in(
    norm: Any, backend: str | None, x: torch.Tensor, p: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What was added to a residual of zeros, and the gradients of x and of the residual."""
    torch.manual_seed(seed)
    x, r = x.clone().requires_grad_(), torch.zeros_like(x).requires_grad_()
    _, stream = norm(x, eps=1e-5, residual=r, dropout_p=p, backend=backend)
    return stream.detach(), *torch.autograd.grad(stream.sum(), (x, r))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 5, 10), (2, 1025)], ids=str)
def test_kernel_and_definition_drop_the_same(
    shape: tuple[int, ...], norm: Any, device: str
) -> None:
    """What ops/common/dropout.py says of row i and column j, after torch's seed."""
    x = torch.ones(shape, device=device)
    torch.manual_seed(11)
    kept = dropout.keep(dropout.draw_seed(x.device), 0.25, x.numel() // shape[-1], shape[-1])
    for backend in ("reference", "triton"):
        added, dx, dresidual = dropped_in(norm, backend, x, 0.25, 11)
        assert torch.equal(added != 0, kept.view(shape))
        torch.testing.assert_close(dx, added)
        assert torch.equal(dresidual, torch.ones_like(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", (0.1, 0.8))
def test_on_torch_it_is_pytorchs_own(p: float, norm: Any) -> None:
    """The same bits as of F.dropout, the addition and ATen's norm, and the same mask after them."""
    x = torch.randn(7, 48)
    residual = torch.randn(7, 48)
    torch.manual_seed(5)
    out, stream = norm(x, eps=1e-5, residual=residual, dropout_p=p, backend="torch")
    torch.manual_seed(5)
    expected = F.dropout(x, p) + residual
    plain = F.layer_norm if norm is fastattn.layer_norm else F.rms_norm
    assert torch.equal(stream, expected)
    assert torch.equal(out, plain(expected, (48,), eps=1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_rate_scale_and_one_mask_in_both_directions(p: float, backend: str, device: str) -> None:
    """The stated share is dropped, the rest scaled; dx is dropped where x was."""
    x = torch.ones(128, 1000, device=device)
    added, dx, dresidual = dropped_in(fastattn.layer_norm, backend, x, p, 1)
    kept = added != 0
    torch.testing.assert_close(added[kept], torch.full_like(added[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    for axis, n in ((0, 128), (1, 1000)):  # no column and no row is special
        share = kept.double().mean(axis)
        assert ((share - (1 - p)).abs() < 6 * (p * (1 - p) / n) ** 0.5).all()
    assert torch.equal(dx, added)
    assert torch.equal(dresidual, torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_through_the_norm_has_the_same_mask(
    norm: Any, backend: str, device: str
) -> None:
    """dx is dresidual, dropped and scaled as x was."""
    x, residual = torch.randn(2, 20, 72, device=device).requires_grad_()
    out, stream = norm(x, eps=1e-5, residual=residual, dropout_p=0.5, backend=backend)
    kept = (stream - residual).abs() > 1e-5
    dx, dresidual = torch.autograd.grad(out, (x, residual), torch.randn_like(out))
    torch.testing.assert_close(dx, torch.where(kept, dresidual * 2, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_follows_torchs_generator(backend: str, device: str) -> None:
    x = torch.randn(16, 64, device=device)

    def added(seed: int | None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return fastattn.layer_norm(x, residual=x, dropout_p=0.5, backend=backend)[1]

    first = added(3)
    assert not torch.equal(first, added(None))
    assert torch.equal(first, added(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_dropout_nothing_is_drawn(backend: str, device: str) -> None:
    x = torch.randn(3, 8, device=device)
    before = torch.get_rng_state()
    fastattn.layer_norm(x, residual=x, dropout_p=0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_has_no_say(backend: str, device: str) -> None:
    """NaN where it is dropped does no harm in the kernels; PyTorch's own dropout multiplies."""
    if backend == "torch":
        pytest.skip("F.dropout: NaN * 0 is NaN")
    case = Case((4, 24), residual=FLOAT, dropout_p=0.5, device=device)
    inputs = case.inputs()
    kept = case.kept(backend, inputs["x"])
    assert kept is not None
    clean, _ = case.ours(backend)(**inputs)
    inputs["x"] = inputs["x"].masked_fill(~kept, float("nan"))
    out, _ = case.ours(backend)(**inputs)
    assert torch.equal(out, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms(backend: str, device: str) -> None:
    x = torch.randn(9, 40, device=device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (dropped_in(fastattn.rms_norm, backend, x, 0.5, 2) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend: str, device: str) -> None:
    """A recomputed forward drops what the first one did."""
    x = torch.randn(9, 40, device=device, requires_grad=True)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return fastattn.layer_norm(x, residual=x, dropout_p=0.5, backend=backend)[0]

    def gradient(f: Any) -> torch.Tensor:
        torch.manual_seed(8)
        out = f(x)
        torch.manual_seed(9)
        return torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(
        gradient(lambda x: checkpoint(norm, x, use_reentrant=False)), gradient(norm)
    )


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
def test_functional_transforms(backend: str | None) -> None:
    """Linear in x for a seed, so a tangent is dropped as x is; never a silent zero."""
    x, t, r = (torch.randn(3, 8, dtype=DOUBLE) for _ in range(3))

    def stream(x: torch.Tensor) -> torch.Tensor:
        return fastattn.layer_norm(x, residual=r, dropout_p=0.5, backend=backend)[1]

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return stream(x)

    primal, tangent = torch.func.jvp(seeded, (x,), (t,))
    kept = (primal - r).abs() > 1e-9
    assert kept.any()
    torch.testing.assert_close(tangent, torch.where(kept, 2 * t, 0.0))
    gradient = torch.func.grad(lambda x: (seeded(x) * t).sum())(x)
    torch.testing.assert_close(gradient, torch.where(kept, 2 * t, 0.0))
    batch = x.expand(64, 3, 8)
    masks = torch.func.vmap(stream, randomness="different")(batch) != r
    assert 0.3 < masks.double().mean() < 0.7
    assert not torch.equal(masks[0], masks[1])
    masks = torch.func.vmap(stream, randomness="same")(batch) != r
    assert (masks == masks[0]).all()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(stream)(batch)
