"""The norms' boundary: errors, dispatch, registration, and the ways torch can look through it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.backends import BACKENDS

import fastattn
from fastattn.ops.common.dropout import draw_seed

KERNELS = ("triton", "cuda")
X = torch.randn(2, 3, 8)
W = torch.randn(8)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a torch.Tensor; got list"),
        (torch.tensor(1.0), {}, ValueError, "x must have at least one dimension"),
        (torch.nested.nested_tensor([X[0]]), {}, TypeError, r"x is a nested tensor.*x.values\(\)"),
        (torch.nested.nested_tensor([X[0]], layout=torch.jagged), {}, TypeError, "x is a nested tensor"),
        (X.to_sparse(), {}, TypeError, r"x must be a dense tensor.*sparse_coo.*x.to_dense\(\)"),
        (X, {"weight": W.to_sparse()}, TypeError, r"weight must be a dense tensor.*weight.to_dense\(\)"),
        (X.int(), {}, TypeError, "x must have one of the dtypes float16, .* got int32: cast"),
        (X.to(torch.complex64), {}, TypeError, "x must have one of the dtypes .* got complex64"),
        (X, {"weight": 1.0}, TypeError, "weight must be a torch.Tensor; got float"),
        (X, {"weight": W.int()}, TypeError, "weight must have one of the dtypes"),
        (X, {"weight": W[:7]}, ValueError, r"weight must have the shape \(hidden,\) = \(8,\).*\(7,\)"),
        (X, {"weight": W[None]}, ValueError, r"weight must have the shape .* got \(1, 8\)"),
        (X, {"weight": W.to("meta")}, ValueError, "weight must be on the device of x, cpu; got meta"),
        (X, {"residual": X[0]}, ValueError, r"residual must have x's shape \(2, 3, 8\); got \(3, 8\)"),
        (X, {"residual": X.long()}, TypeError, "residual must have one of the dtypes"),
        (X, {"residual": X.to("meta")}, ValueError, "residual must be on the device of x"),
        (X, {"eps": "1e-5"}, TypeError, "eps must be a float; got str"),
        (X, {"eps": -1e-5}, ValueError, "eps must be finite and not negative; got -1e-05"),
        (X, {"eps": float("nan")}, ValueError, "eps must be finite and not negative; got nan"),
        (X, {"eps": float("inf")}, ValueError, "eps must be finite and not negative; got inf"),
        (X, {"dropout_p": "0.1", "residual": X}, TypeError, "dropout_p must be a float; got str"),
        (X, {"dropout_p": True, "residual": X}, TypeError, "dropout_p must be a float; got bool"),
        (X, {"dropout_p": 1.0, "residual": X}, ValueError, r"dropout_p must lie in \[0, 1\); got 1.0"),
        (X, {"dropout_p": -0.1, "residual": X}, ValueError, r"dropout_p must lie in \[0, 1\); got -0.1"),
        (X, {"dropout_p": float("nan"), "residual": X}, ValueError, r"must lie in \[0, 1\); got nan"),
        (X, {"dropout_p": 0.5}, ValueError, "dropout_p=0.5 drops .*: give a residual, or normalise"),
        (X, {"backend": "fast"}, ValueError, "backend must be one of 'gluon', 'cuda', 'triton', .* got 'fast'"),
    ],
)  # fmt: skip
def test_errors(x: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    for norm in (fastattn.layer_norm, fastattn.rms_norm):
        for _ in range(2):  # an error is not forgotten by the cache of plans
            with pytest.raises(error, match=message):
                norm(x, **options)


def test_errors_of_layer_norm_alone() -> None:
    with pytest.raises(ValueError, match=r"bias must have the shape \(hidden,\) = \(8,\)"):
        fastattn.layer_norm(X, W, W[:1])
    with pytest.raises(TypeError, match="eps must be a float; got NoneType"):
        fastattn.layer_norm(X, W, W, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "x", "reason"),
    [
        ("triton", X.double(), "float64"),
        ("triton", torch.randn(1, 65537), "up to 65536; got 65537"),
        ("cuda", X.double(), "compute in float32: float64 would lose precision"),
    ],
)
def test_what_kernels_decline(backend: str, x: torch.Tensor, reason: str) -> None:
    for norm in (fastattn.layer_norm, fastattn.rms_norm):
        with pytest.raises(fastattn.UnsupportedError, match=reason):
            norm(x, backend=backend)
        norm(x)  # left open, another backend takes it


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = fastattn.explain(fastattn.layer_norm, X.half(), W, W, residual=X)
    assert capsys.readouterr().out.strip() == str(explanation)
    assert explanation.backend == "torch"
    assert explanation.problem == (
        "x (2, 3, 8) float16, weight float32, bias float32, residual float32, on cpu"
    )
    explanation = fastattn.explain(fastattn.rms_norm, X, W, 1e-6, X, backend="reference")
    assert explanation.backend == "reference"
    dropping = fastattn.explain(fastattn.layer_norm, X, residual=X, dropout_p=0.5)
    assert dropping.backend == "torch" and "dropout_p=0.5" in dropping.problem
    with pytest.raises(ValueError, match="weight must have the shape"):
        fastattn.explain(fastattn.rms_norm, X, W[:3])


def test_no_plan_is_taken_for_another() -> None:
    """Calls that differ in one fact each, twice over: the cache of plans keeps them apart."""
    calls: list[tuple[Any, ...]] = [
        (X, W, 1e-5, None),
        (X, W, 1e-1, None),
        (X, W.half(), 1e-5, None),
        (X, None, 1e-5, None),
        (X, W, 1e-5, X),
        (X, W, 1e-5, X.half()),
        (X.half(), W, 1e-5, X),
        (X[0], W, 1e-5, None),
        (X.double(), W, 1e-5, None),
    ]
    for _ in range(2):
        for x, weight, eps, residual in calls:
            s = x if residual is None else x + residual
            for norm, plain in (
                (fastattn.layer_norm, F.layer_norm),
                (fastattn.rms_norm, F.rms_norm),
            ):
                out = norm(x, weight, eps=eps, residual=residual)
                out = out if residual is None else out[0]
                w = None if weight is None else weight.double()
                expected = plain(s.double(), (8,), w, eps=eps).to(s.dtype)
                torch.testing.assert_close(out, expected)


def test_autocast() -> None:
    """The dtypes of F.layer_norm and F.rms_norm: on the CPU autocast leaves them alone."""
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x, w = X.to(dtype), W.to(dtype)
            for backend in ("torch", "reference", "triton"):
                if (backend, dtype) == ("triton", torch.float64):
                    continue
                if backend == "triton" and torch.cuda.is_available():
                    continue
                ours = fastattn.layer_norm(x, w, w, backend=backend)
                assert ours.dtype == F.layer_norm(x, (8,), w, w).dtype
                ours = fastattn.rms_norm(x, w, backend=backend)
                assert ours.dtype == F.rms_norm(x, (8,), w).dtype
                if dtype != torch.float64:
                    options: Any = {"residual": X, "dropout_p": 0.5, "backend": backend}
                    both = fastattn.layer_norm(x, **options)
                    assert both[0].dtype == both[1].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_on_a_gpu(backend: str) -> None:
    w = W.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            x = X.cuda().to(dtype).requires_grad_()
            for ours, plain in (
                (fastattn.layer_norm(x, w, backend=backend), F.layer_norm(x, (8,), w)),
                (fastattn.rms_norm(x, w, backend=backend), F.rms_norm(x, (8,), w)),
            ):
                assert ours.dtype == plain.dtype == torch.float32
                torch.testing.assert_close(ours, plain)
            out, stream = fastattn.layer_norm(x, w, residual=x, backend=backend)
            assert (out.dtype, stream.dtype) == (torch.float32, dtype)
            (dx,) = torch.autograd.grad(out.sum() + stream.sum(), x)
            assert dx.dtype == dtype


def test_no_warning_about_mixed_dtypes() -> None:
    """torch's own rms_norm warns that it is not fused; we do not hand it such a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.rms_norm(X.bfloat16(), W)


def test_meta_tensors() -> None:
    """Models are built and traced on the meta device."""
    x = X.to("meta").half()
    out, stream = fastattn.layer_norm(x, W.to("meta"), residual=x)
    assert out.shape == stream.shape == x.shape
    assert out.dtype == stream.dtype == x.dtype
    assert out.device.type == "meta"


# Of a residual, whether there is dropout, and who does it.
OF_RESIDUALS = pytest.mark.parametrize(
    ("residual", "dropout_p", "backend"),
    [
        *((r, 0.0, b) for r in (None, torch.float32, torch.float16) for b in KERNELS),
        *((r, 0.25, "triton") for r in (torch.float32, torch.float16)),
    ],
)


@OF_RESIDUALS
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_opcheck(
    residual: torch.dtype | None, dropout_p: float, center: bool, backend: str, device: str
) -> None:
    x = torch.randn(3, 2, 12, device=device, requires_grad=True)
    r = None if residual is None else x.detach().to(residual).requires_grad_()
    weight = torch.randn(12, device=device, requires_grad=True)
    bias = torch.randn(12, device=device, requires_grad=True) if center else None
    dropping = (draw_seed(x.device) if dropout_p else None, dropout_p)
    options = (*dropping, 1e-5, center, torch.float32, backend, True)
    op = torch.ops.fastattn.layer_norm
    laws.opcheck(op, x, r, weight, bias, *options)
    with torch.no_grad():
        out, stream, statistics = op(x, r, weight, bias, *options)
    dstream, stream = (None, x.detach()) if r is None else (torch.randn_like(stream), stream)
    tensors = (torch.randn_like(out), dstream, stream, weight.detach(), statistics)
    dtypes = (torch.float32, residual, torch.float32 if center else None)
    arguments = (*tensors, *dropping, 1e-5, center, *dtypes, True, backend, True)
    laws.opcheck(torch.ops.fastattn.layer_norm_backward, *arguments)


@pytest.mark.parametrize(
    ("dropping", "backend"),
    [*((False, b) for b in BACKENDS), *((True, b) for b in BACKENDS if b != "cuda")],
)
@pytest.mark.parametrize("norm", (fastattn.layer_norm, fastattn.rms_norm))
def test_compiles_without_a_graph_break(
    norm: Any, dropping: bool, backend: str, device: str
) -> None:
    """And with dropout the numbers of the same seed."""
    weight = torch.randn(16, device=device, requires_grad=True)

    def step(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        options: Any = {"eps": 1e-5, "dropout_p": 0.3 if dropping else 0, "backend": backend}
        out, residual = norm(x, weight, residual=residual, **options)
        return norm(out, weight, eps=1e-5, backend=backend).square().sum() + residual.sum()

    def draw(length: int) -> list[torch.Tensor]:
        return [torch.randn(2, length, 16, device=device, requires_grad=True) for _ in "xr"]

    laws.one_graph(step, draw, [weight])


def test_compiles_with_the_default_choice() -> None:
    torch._dynamo.reset()
    for norm in (fastattn.layer_norm, fastattn.rms_norm):
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        for arguments in ((X,), (X, W), (X.half(), W)):
            torch.testing.assert_close(compiled(*arguments), norm(*arguments))
        torch.testing.assert_close(compiled(X, W, residual=X), norm(X, W, residual=X))


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_functional_transforms(center: bool, backend: str | None) -> None:
    x, r = (torch.randn(3, 8, dtype=torch.float64) for _ in range(2))
    weight = W.double()
    norm: Any = fastattn.layer_norm if center else fastattn.rms_norm

    def ours(x: torch.Tensor) -> torch.Tensor:
        out, stream = norm(x, weight, eps=1e-5, residual=r, backend=backend)
        return out + stream

    def formula(x: torch.Tensor) -> torch.Tensor:
        s = x + r
        y = s - s.mean(-1, keepdim=True) if center else s
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + s

    laws.functional_transforms(ours, formula, x)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_refuse_transforms(backend: str, device: str) -> None:
    for norm in (fastattn.layer_norm, fastattn.rms_norm):
        laws.kernels_refuse_transforms(lambda x, norm=norm: norm(x, backend=backend), X.to(device))


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_second_derivative(center: bool, dropout_p: float, backend: str) -> None:
    x, r = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(
        x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(2)
        options: Any = {"residual": r, "dropout_p": dropout_p, "backend": backend}
        if center:
            return fastattn.layer_norm(x, w, b, **options)  # type: ignore[return-value]
        return fastattn.rms_norm(x, w * b, 1e-5, **options)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(function, (x, r, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, r, w, b))


@OF_RESIDUALS
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_second_derivative_through_the_kernels(
    residual: torch.dtype | None, dropout_p: float, center: bool, backend: str, device: str
) -> None:
    tensors = [torch.randn(3, 8, device=device), torch.randn(8, device=device)]
    if center:
        tensors.append(torch.randn(8, device=device))
    if residual is not None:
        tensors.append(torch.randn(3, 8, device=device).to(residual))

    def norm(backend: str, x: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> Any:
        bias = rest[:1] if center else ()
        function: Any = fastattn.layer_norm if center else fastattn.rms_norm
        r = rest[-1] if residual else None
        options = {"eps": 1e-5, "residual": r, "dropout_p": dropout_p, "backend": backend}
        return function(x, w, *bias, **options)

    ours, reference = (functools.partial(norm, name) for name in (backend, "reference"))
    cotangents = [torch.randn(3, 8, device=device) for _ in range(2 if residual else 1)]
    laws.second_derivative(ours, reference, tensors, cotangents)


@pytest.mark.parametrize("backend", KERNELS)
def test_batched_cotangents(backend: str, device: str) -> None:
    ours, reference = (
        functools.partial(fastattn.layer_norm, backend=name) for name in (backend, "reference")
    )
    laws.batched_cotangents(ours, reference, X.to(device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_captured_by_a_cuda_graph() -> None:
    x, w = torch.randn(3, 64, device="cuda", dtype=torch.float16), torch.randn(64, device="cuda")
    fastattn.layer_norm(x, w, residual=x, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stream = fastattn.layer_norm(x, w, residual=x, backend="triton")
    x.normal_()
    graph.replay()
    torch.testing.assert_close(stream, x + x)
    torch.testing.assert_close(out, F.layer_norm((x + x).float(), (64,), w).half())
