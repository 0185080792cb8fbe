"""The norms' dropout: which elements it drops, on every backend, in both directions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.layer_norm.cases import Case, check
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.ops.common import dropout
from fastattn.ops.layer_norm import cuda
from fastattn.ops.layer_norm.problem import describe_layer_norm

BACKENDS = ("reference", "torch", "triton")
NORMS = (fastattn.layer_norm, fastattn.rms_norm)
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

CASES = {
    "one column": Case((6, 1), residual=FLOAT, dropout_p=0.5),  # of a block of four random words
    "two columns": Case((6, 2), residual=FLOAT, dropout_p=0.5),
    "odd": Case((5, 7), residual=FLOAT, dropout_p=0.25),
    "one dimension": Case((24,), residual=FLOAT, dropout_p=0.25),
    "four dimensions": Case((2, 3, 2, 33), residual=FLOAT, dropout_p=0.9),
    "several rows a tile": Case((33, 64), residual=FLOAT, dropout_p=0.1),
    "more rows than a program takes": Case((150, 600), residual=FLOAT, dropout_p=0.1),
    "one row a tile": Case((3, 2049), residual=FLOAT, dropout_p=0.3),
    "float16": Case((6, 100), HALF, weight=HALF, bias=HALF, residual=HALF, dropout_p=0.1),
    "bfloat16": Case((6, 100), BF16, weight=BF16, bias=BF16, residual=BF16, dropout_p=0.1),
    "float32 residual stream": Case((6, 100), BF16, residual=FLOAT, dropout_p=0.1),
    "lower residual": Case((6, 100), FLOAT, residual=BF16, dropout_p=0.1),
    "nearly nothing is kept": Case((6, 100), residual=FLOAT, dropout_p=0.999),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, center: bool, backend: str, device: str) -> None:
    if name == "one column" and not center:
        pytest.skip("rms_norm of one element is +-1: its gradient is nothing but rounding")
    check(dataclasses.replace(CASES[name], center=center, device=device), backend)


@pytest.mark.parametrize(
    "center", [True, pytest.param(False, marks=pytest.mark.long)], ids=("layer_norm", "rms_norm")
)
def test_rows_in_chunks(center: bool, device: str) -> None:
    check(Case((3, 8201), HALF, center, residual=FLOAT, dropout_p=0.2, device=device), "triton")


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_float64(backend: str, device: str) -> None:
    case = Case((5, 33), DOUBLE, True, DOUBLE, DOUBLE, DOUBLE, dropout_p=0.3, device=device)
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str, device: str) -> None:
    """An element's place is its row and column, wherever the memory has it."""
    case = Case((4, 6, 24), residual=FLOAT, dropout_p=0.4, device=device)
    inputs = case.inputs()
    for x in (
        torch.randn(4, 6, 3, 24, device=device)[:, :, 1],
        torch.randn(6, 4, 24, device=device).transpose(0, 1),
        torch.randn(4, 6, 48, device=device)[..., ::2],
        torch.randn(24, device=device).expand(4, 6, 24),
    ):
        check(case, backend, inputs | {"x": x})
        check(case, backend, inputs | {"residual": x})


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


def test_what_is_kept_for_the_backward(device: str) -> None:
    """The sum, the weight, two floats a row and the seed: no mask."""
    x, residual = torch.randn(2, 64, 256, device=device, requires_grad=True)
    weight = torch.randn(256, device=device, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastattn.layer_norm(x, weight, residual=residual, dropout_p=0.1, backend="triton")
    assert sorted(t.numel() for t in kept) == [1, 2 * 64, 256, 64 * 256]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, device: str) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    out, stream = fastattn.layer_norm(x, residual=x, dropout_p=0.5, backend=backend)
    assert out.shape == stream.shape == shape
    (dx,) = torch.autograd.grad(out.sum() + stream.sum(), x)
    assert dx.shape == shape


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
def test_autocast(backend: str) -> None:
    x = torch.randn(3, 8, dtype=BF16)
    with torch.autocast("cpu", BF16):
        out, stream = fastattn.layer_norm(x, residual=x.float(), dropout_p=0.5, backend=backend)
    assert out.dtype == stream.dtype == FLOAT


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


@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
@pytest.mark.parametrize("residual", (FLOAT, HALF))
def test_opcheck(residual: torch.dtype, center: bool, device: str) -> None:
    x = torch.randn(3, 2, 12, device=device, requires_grad=True)
    r = x.detach().to(residual).requires_grad_()
    weight = torch.randn(12, device=device, requires_grad=True)
    seed = dropout.draw_seed(x.device)
    arguments = (x, r, weight, None, seed, 0.25, 1e-5, center, FLOAT, "triton", True)
    laws.opcheck(torch.ops.fastattn.layer_norm, *arguments)
    with torch.no_grad():
        out, stream, statistics = torch.ops.fastattn.layer_norm(*arguments)
    backward = (
        torch.randn_like(out), torch.randn_like(stream), stream, weight.detach(), statistics, seed,
        0.25, 1e-5, center, FLOAT, residual, None, True, "triton", True,
    )  # fmt: skip
    laws.opcheck(torch.ops.fastattn.layer_norm_backward, *backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    """And with the numbers of the same seed."""

    def step(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out, stream = fastattn.rms_norm(x, None, 1e-5, residual, dropout_p=0.3, backend=backend)
        return out.square().sum() + stream.sum()

    def draw(length: int) -> list[torch.Tensor]:
        return [torch.randn(2, length, 16, device=device, requires_grad=True) for _ in "xr"]

    laws.one_graph(step, draw)


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


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("norm", NORMS)
def test_second_derivative(norm: Any, backend: str) -> None:
    x, r = (torch.randn(2, 5, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=DOUBLE, requires_grad=True)

    def function(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        torch.manual_seed(2)
        return norm(x, w, eps=1e-5, residual=r, dropout_p=0.4, backend=backend)

    assert torch.autograd.gradcheck(function, (x, r, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, r, w))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", (FLOAT, HALF))
def test_second_derivative_through_the_kernels(
    residual: torch.dtype, norm: Any, device: str
) -> None:
    x, w, r = (torch.randn(shape, device=device) for shape in ((3, 8), (8,), (3, 8)))

    def dropped(backend: str, x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> Any:
        return norm(x, w, eps=1e-5, residual=r, dropout_p=0.4, backend=backend)

    ours, reference = (functools.partial(dropped, name) for name in ("triton", "reference"))
    cotangents = [torch.randn(3, 8, device=device) for _ in range(2)]
    laws.second_derivative(ours, reference, [x, w, r.to(residual)], cotangents)


def test_explain() -> None:
    x = torch.randn(2, 8)
    explanation = fastattn.explain(fastattn.layer_norm, x, residual=x, dropout_p=0.5)
    assert explanation.backend == "torch"
    assert "dropout_p=0.5" in explanation.problem


def test_the_cuda_kernels_have_none() -> None:
    x = torch.empty(2, 24, device="meta")
    problem = describe_layer_norm(x, residual=x, dropout_p=0.5)
    assert cuda.unsupported(problem) == "the CUDA kernels of the norms have no dropout"
