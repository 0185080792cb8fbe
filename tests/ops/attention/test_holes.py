"""What other implementations of attention got wrong, by name."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ops.attention.cases import LAYOUTS, WITH_DOCUMENTS, Case, check, formula
from ops.backends import BACKENDS, assert_near, widest
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.attention.call import NO_GRADIENT, Extras
from fastattn.ops.attention.problem import check_varlen, describe

KERNELS = ("triton", "cuda")


def normal(
    *shape: int, device: str = "cpu", seed: int = 0, backend: str | None = None
) -> torch.Tensor:
    """In the dtype that the backend takes."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(widest(backend)).to(device)


def with_lse(backend: str, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) without gradients; of ATen, which has no LSE on a GPU, the LSE is the definition's."""
    with torch.no_grad():
        if backend == "torch" and args[0].device.type != "cpu":
            out = fastattn.attention(*args, **options, backend="torch")
            backend = "reference"
            return out, fastattn.attention(*args, **options, return_lse=True, backend=backend)[1]
        return fastattn.attention(*args, **options, return_lse=True, backend=backend)


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_below_88_with_a_mask(backend: str, device: str) -> None:
    """An LSE far below -88.7, where exp(lse) underflows, with a mask and seqlen_k % 128 == 64."""
    q = torch.full((1, 3, 1, 16), 30.0, device=device, dtype=widest(backend))
    k = -torch.rand(1, 192, 1, 16, generator=torch.Generator().manual_seed(0)).to(q) - 1
    v = normal(1, 192, 1, 16, device=device, seed=1, backend=backend)
    mask = (normal(1, 1, 3, 192, seed=2) > 0).to(device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, mask=mask, backend=backend)
    out.square().sum().backward()
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    expected, lse = formula(*doubles, mask=mask)
    expected.square().sum().backward()
    assert lse.max() < -88.7
    assert_near(out, expected)
    for ours, exact in zip(leaves, doubles):
        assert_near(ours.grad, exact.grad, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seqlen_k", (1, 64, 203))
def test_one_query_with_a_negative_lse(seqlen_k: int, backend: str, device: str) -> None:
    q = torch.full((2, 1, 2, 16), 4.0, device=device, dtype=widest(backend))
    k = normal(2, seqlen_k, 2, 16, device=device, backend=backend).abs() - 20
    v = normal(2, seqlen_k, 2, 16, device=device, seed=1, backend=backend)
    out, lse = with_lse(backend, q, k, v, causal=True)
    expected, exact = formula(q.double(), k.double(), v.double())
    assert exact.max() < -100
    assert_near(out, expected, atol=1e-4)
    assert_near(lse, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", (-1, 1))
def test_extreme_logits(sign: int, backend: str, device: str) -> None:
    """exp of them overflows or underflows; the softmax is one-hot and its gradients are finite."""
    q, k, v = (normal(1, 40, 2, 16, device=device, seed=s, backend=backend) for s in range(3))
    factor = sign * (1e4 if backend == "cuda" else 1e6)  # float16 ends at 65504
    q = (factor * q).requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()
    out = fastattn.attention(q, k, v, causal=True, backend=backend)
    expected, exact = formula(q.double(), k.double(), v.double(), causal=True)
    assert_near(out, expected, rtol=1e-5)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    _, lse = with_lse(backend, q, k, v, causal=True)
    assert_near(lse, exact, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_hides(backend: str, device: str) -> None:
    """As a mask does: a row that is hidden throughout has output 0, LSE -inf, no NaN in gradients."""
    q, k, v = (
        normal(2, n, 2, 16, device=device, seed=s, backend=backend)
        for s, n in enumerate((20, 40, 40))
    )
    mask = normal(2, 1, 20, 40, device=device, seed=3) > 0
    mask[:, :, 7] = False
    bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    bias.requires_grad_(backend != "cuda")  # which has no gradient of it
    out = fastattn.attention(*leaves, bias=bias, backend=backend)
    out.square().sum().backward()
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    expected, exact = formula(*doubles, mask=mask)
    expected.square().sum().backward()
    assert_near(out, expected, atol=1e-4)
    for ours, wanted in zip(leaves, doubles):
        assert_near(ours.grad, wanted.grad, atol=1e-4)
    assert bias.grad is None or (bias.grad[~mask] == 0).all()
    _, lse = with_lse(backend, q, k, v, bias=bias)
    assert torch.equal(lse == float("-inf"), exact == float("-inf"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (None, torch.float16))
def test_a_bias_of_the_least_number(dtype: torch.dtype | None, backend: str, device: str) -> None:
    """Masks of some libraries add float32's least number; a row of nothing else is no NaN and no 0."""
    dtype = dtype or widest(backend)
    q, k, v = (normal(1, 5, 2, 16, device=device, seed=s).to(dtype) for s in range(3))
    bias = torch.full((5, 5), torch.finfo(torch.float32).min, device=device).triu(1)
    bias[2] = torch.finfo(torch.float32).min
    out = fastattn.attention(q, k, v, bias=bias, backend=backend).double()
    expected, _ = formula(q.double(), k.double(), v.double(), causal=True)
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(out[:, rest], expected[:, rest], rtol=1e-2, atol=1e-2)
    assert out[:, 2].isfinite().all() and out[:, 2].abs().max() > 1e-3


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds a product minus a number once, as the compiled kernels do."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, subtract = InterpreterBuilder.create_fmul, InterpreterBuilder.create_fsub

    def create_fmul(self: Any, lhs: Any, rhs: Any) -> Any:
        product = multiply(self, lhs, rhs)
        if lhs.data.dtype == np.float32:
            product.exact = lhs.data.astype(np.float64) * rhs.data
        return product

    def create_fsub(self: Any, lhs: Any, rhs: Any) -> Any:
        exact = getattr(lhs, "exact", None)
        if exact is None:
            return subtract(self, lhs, rhs)
        return TensorHandle((exact - rhs.data).astype(np.float32), lhs.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_fmul", create_fmul)
    monkeypatch.setattr(InterpreterBuilder, "create_fsub", create_fsub)


@pytest.mark.parametrize("scale", (None, 0.07, 1.0))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("backend", ("reference", *KERNELS))
def test_logits_beyond_24_bits(
    backend: str, head_dim: int, scale: float | None, device: str, fused: None
) -> None:
    """Where float32 holds no fractions of a score any more, weights are still 1 for equal keys."""
    v = normal(1, 100, 1, head_dim, device=device).half()
    for size in (5120.0, 10240.0, 65024.0):  # whose sums of products are exact in any order
        q = torch.full((1, 3, 1, head_dim), size, device=device).half()
        k = q[:, :1].expand(1, 100, 1, head_dim).clone()
        k[:, 10:70] *= 0.5  # the highest first, in the middle nothing, and once more
        q[:, 1] = -q[:, 1]
        out, lse = fastattn.attention(
            q, k, v, softmax_scale=scale, return_lse=True, backend=backend
        )
        exact, exact_lse = formula(q.double(), k.double(), v.double(), softmax_scale=scale)
        torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, atol=0, rtol=1e-5)


@pytest.mark.parametrize("softcap", (1e-300, 1e-50, 1e-42, 1e30, 1e39, 1e300))
@pytest.mark.parametrize("backend", KERNELS)
def test_softcaps_that_float32_does_not_hold(backend: str, softcap: float, device: str) -> None:
    q, k, v, dout = (
        normal(1, n, 1, 16, device=device, seed=s).half() for s, n in enumerate((9, 20, 20, 9))
    )
    found = []
    for one, dtype in ((backend, torch.float16), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, softcap=softcap, backend=one)
        found.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    for ours, exact in zip(*found):
        torch.testing.assert_close(ours.double(), exact, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
@pytest.mark.parametrize("value", (float("-inf"), -1e4, 1e4))
def test_extreme_sinks(value: float, backend: str, device: str) -> None:
    """A sink of -inf is none; a large one takes all of the weight, and its gradient is finite."""
    q, k, v = (
        normal(1, 20, 2, 16, device=device, seed=s, backend=backend).requires_grad_()
        for s in range(3)
    )
    sink = torch.full((2,), value, device=device, requires_grad=True)
    options = {"causal": True, "backend": backend, "return_lse": True}
    out, lse = fastattn.attention(q, k, v, sink=sink, **options)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, sink))
    if value < 0:
        expected, exact = fastattn.attention(q, k, v, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, exact)
    else:
        assert out.abs().max() == 0
        torch.testing.assert_close(lse, torch.full_like(lse, value))


# --- rows without a key ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_key(backend: str, device: str) -> None:
    """Output 0, LSE -inf, gradients 0, also for extreme logits."""
    q = (1e4 * normal(1, 9, 2, 16, device=device, backend=backend)).requires_grad_()
    k, v = (
        normal(1, 4, 2, 16, device=device, seed=s, backend=backend).requires_grad_() for s in (1, 2)
    )
    out, lse = with_lse(backend, q, k, v, causal=True)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert (lse[:, :, :5] == float("-inf")).all() and lse[:, :, 5:].isfinite().all()
    out = fastattn.attention(q, k, v, causal=True, backend=backend)
    out.sum().backward()
    assert torch.equal(q.grad[:, :5], torch.zeros_like(q.grad[:, :5]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
def test_an_infinite_gradient_of_an_empty_row_has_no_effect(backend: str, device: str) -> None:
    q, k = (normal(1, n, 1, 16, device=device, backend=backend).requires_grad_() for n in (6, 4))
    out, lse = fastattn.attention(q, k, k, causal=True, return_lse=True, backend=backend)
    dlse = torch.ones_like(lse)
    dlse[:, :, :2] = float("inf")
    torch.autograd.backward([out, lse], [torch.ones_like(out), dlse])
    assert q.grad.isfinite().all() and k.grad.isfinite().all() and (q.grad[:, :2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty(dims: tuple[int, int, int], backend: str | None, device: str) -> None:
    batch, seqlen_q, seqlen_k = dims
    q, k = (
        normal(batch, n, 2, 16, device=device, backend=backend).requires_grad_()
        for n in (seqlen_q, seqlen_k)
    )
    if backend == "torch":
        with pytest.raises(fastattn.UnsupportedError, match="empty"):
            fastattn.attention(q, k, k, backend="torch")
        backend = None  # left open, another backend takes it
    out, lse = fastattn.attention(q, k, k, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (batch, 2, seqlen_q)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    assert torch.equal(q.grad, torch.zeros_like(q)) and torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
@pytest.mark.parametrize("side", ("no keys", "no queries", "no batch"))
def test_gradients_of_features_of_an_empty_call(side: str, backend: str, device: str) -> None:
    """Zeros in the feature's shape; without keys the LSE is the sink, and so is its gradient."""
    batch, n, m = {"no keys": (2, 5, 0), "no queries": (2, 0, 5), "no batch": (0, 5, 5)}[side]
    q, k = (normal(batch, size, 3, 16, device=device, backend=backend) for size in (n, m))
    bias = torch.randn(1, 3, n, 1, device=device, requires_grad=backend != "cuda")
    sink = torch.randn(3, device=device, requires_grad=True)
    out, lse = fastattn.attention(q, k, k, bias=bias, sink=sink, return_lse=True, backend=backend)
    (out.sum() + lse.sum()).backward()
    if bias.requires_grad:
        assert bias.grad.shape == bias.shape and (bias.grad == 0).all()
    if side == "no keys":
        torch.testing.assert_close(lse, sink[:, None].expand(2, 3, 5))
        torch.testing.assert_close(sink.grad, torch.full_like(sink, 10.0))
    else:
        assert (sink.grad == 0).all()


# --- padding --------------------------------------------------------------------------------------


class Fills(TorchDispatchMode):
    """Counts what fills memory with one number, and gives what is not filled NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("zeros", "new_zeros", "full", "new_full", "zeros_like", "zero_", "fill_"):
            self.seen.append(name)
        if name in ("empty", "new_empty", "empty_like") and result.is_floating_point():
            result.fill_(float("nan"))
        return result


# A tail of more tokens than a tile has, sequences of which little, nothing and all is used.
GAPS: dict[str, dict[str, Any]] = {
    "none": {"starts": (0, 40, 40, 177), "tail": 0},
    "tail": {"starts": (0, 40, 40, 177), "tail": 300},
    "seqused": {"starts": (0, 40, 40, 177), "tail": 5, "used": (3, 0, 137)},
    "nothing is used": {"starts": (0, 40, 90), "tail": 1, "used": (0, 0)},
    "no sequence": {"starts": (0,), "tail": 7},
    "no token of a sequence": {"starts": (0, 0, 0), "tail": 7},
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", GAPS)
def test_gaps_between_packed_sequences(name: str, backend: str, device: str) -> None:
    """The kernels write 0, and -inf to the LSE; only without any sequence something else does."""
    module = importlib.import_module(f"fastattn.ops.attention.{backend}")
    case = GAPS[name]
    starts, tail, used = case["starts"], case["tail"], case.get("used")
    total = starts[-1] + tail
    lengths = used or [b - a for a, b in itertools.pairwise(starts)]
    inside = torch.zeros(total, dtype=torch.bool)
    for start, n in zip(starts, lengths):
        inside[start : start + n] = True

    def draw(heads: int, width: int, seed: int) -> torch.Tensor:
        x = normal(total, heads, width, seed=seed).half()
        return x.masked_fill(~inside[:, None, None], float("nan")).to(device)

    q, k, v, dout = (draw(*shape) for shape in ((4, 16, 0), (2, 16, 1), (2, 24, 2), (4, 24, 3)))
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    its = None if used is None else torch.tensor(used, dtype=torch.int32, device=device)
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    settings, extras = check_varlen(
        q, k, v, cu, cu, longest, longest, causal=True, seqused_q=its, seqused_k=its
    )
    with Fills() as fills:
        out, lse = module.forward(q, k, v, extras, settings)
        grads = module.backward(dout, None, out, lse, NO_GRADIENT, q, k, v, extras, settings)[:3]
    assert bool(fills.seen) == (longest == 0)
    for x in (out, *grads):
        assert (x[~inside] == 0).all() and x.isfinite().all()
    assert (lse[:, ~inside] == -torch.inf).all() and lse[:, inside].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.int32, (-3, 0, 20, 2**31 - 1)),
        (torch.int64, (-3, 0, 20, 2**31)),
        (torch.int64, (5 - 2**32, 0, 7, 2**32 + 5)),
    ],
)
def test_lengths_beyond_the_tensor(
    values: tuple[int, ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    """A negative one is 0, one above seqlen_k is seqlen_k; width of v and a length of 0 together."""
    q, k, v = (normal(4, 20, 2, n, device=device, seed=n, backend=backend) for n in (8, 8, 24))
    lengths = torch.tensor(values, device=device, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, key_lengths=lengths, backend=backend)
    expected, _ = formula(q.double(), k.double(), v.double(), key_lengths=lengths)
    assert_near(out, expected)
    out.sum().backward()
    assert all((x.grad[:2] == 0).all() and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_inside_follows_ieee(backend: str, device: str) -> None:
    """A NaN query spoils only its own row, a NaN key every row of its head."""
    q, k, v = (normal(1, 40, 2, 16, device=device, seed=s, backend=backend) for s in range(3))
    q[0, 5, 1] = float("nan")
    out = fastattn.attention(q, k, v, backend=backend)
    spoilt = out.isnan().any(-1)
    assert spoilt[0, 5, 1] and spoilt.sum() == 1
    k[0, 33, 0, 3] = float("nan")
    out = fastattn.attention(q, k, v, backend=backend)
    assert out[:, :, 0].isnan().all() and not out[0, :5, 1].isnan().any()


# --- integers that overflow -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "window", [(2**31 - 1, 2**31 - 1), (2**31 - 1, 3), (3, 2**31 - 1), (2**40, 0)]
)
def test_wide_windows(window: tuple[int, int], backend: str, device: str) -> None:
    """i + d + right passes 2^31 where right is "as good as unbounded"."""
    q, k, v = (normal(1, n, 2, 16, device=device, seed=n, backend=backend) for n in (40, 70, 70))
    out = fastattn.attention(q, k, v, window=window, backend=backend)
    expected, _ = formula(q.double(), k.double(), v.double(), window=window)
    assert_near(out, expected)


@pytest.mark.parametrize("backend", WITH_DOCUMENTS)
def test_document_ids_of_64_bits(backend: str, device: str) -> None:
    """Ids that are equal in their low 32 bits are not equal; negative ones are ids like others."""
    ids = torch.tensor([-1, -1, 5, 5 + 2**32, 5 + 2**32, -(2**62), 7, 7], device=device)[None]
    q, k, v = (normal(1, 8, 2, 16, device=device, seed=s) for s in range(3))
    out = fastattn.attention(q, k, v, document_ids=ids, backend=backend)
    expected, _ = formula(q.double(), k.double(), v.double(), document_ids=(ids, ids))
    assert_near(out, expected)


def test_large_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """batch * heads beyond 65535: one grid axis, the others of CUDA end there."""
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.common import launch

    grids = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *a, **c: grids.append(grid))
    q = torch.empty(4096, 128, 32, 64, dtype=torch.float16, device="meta")
    settings = describe(q, q, q, causal=True).settings
    out, lse = kernels.forward(q, q, q, Extras(), settings)
    kernels.backward(out, lse, out, lse, NO_GRADIENT, q, q, q, Extras(), settings)
    assert len(grids) >= 3
    assert all(max((*grid[1:], 1)) <= 65535 and grid[0] < 2**31 for grid in grids)
    assert max(grid[0] for grid in grids) > 65535


@pytest.mark.skipif(not torch.cuda.is_available(), reason="65537 programs take minutes interpreted")
def test_more_than_65535_heads_and_sequences() -> None:
    q, k, v = (normal(65537, 3, 1, 16, device="cuda", seed=s).half() for s in range(3))
    for a, b, c in ((q, k, v), [x.transpose(0, 2) for x in (q, k, v)]):
        leaves = [x.detach().requires_grad_() for x in (a, b, c)]
        out = fastattn.attention(*leaves, causal=True, backend="triton")
        out.sum().backward()
        expected, _ = formula(a.double(), b.double(), c.double(), causal=True)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        assert all(x.grad.isfinite().all() for x in leaves)


on_a_file = pytest.mark.skipif(
    triton_runs() != "interpreted",
    reason="a sparse file of gigabytes stands behind the tensor, which only the interpreter can use",
)


@on_a_file
def test_offsets_beyond_2_31(tmp_path: Path) -> None:
    """Views with strides of 2^31 elements over a sparse file, of which two pages are touched."""
    stride = 2**31
    path = tmp_path / "storage"
    with path.open("wb") as file:
        file.truncate(2 * (stride + 256))
    storage = torch.from_file(str(path), shared=True, size=stride + 256, dtype=torch.float16)
    near = normal(2, 2, 2, 16).half()
    dense = fastattn.attention(near, near, near, backend="triton")
    for dim in range(3):  # the stride of the batch, of the tokens, of the heads
        strides = [64, 32, 16]
        strides[dim] = stride
        far = storage.as_strided(near.shape, (*strides, 1))
        far.copy_(near)
        assert torch.equal(fastattn.attention(far, far, far, backend="triton"), dense)
    far = storage.as_strided((2, 2, 16), (stride, 16, 1))  # packed tokens
    far.copy_(near[0])
    cu = torch.tensor([0, 2])
    packed = fastattn.attention_varlen(far, far, far, cu, cu, backend="triton")
    assert torch.equal(packed, dense[0])


@on_a_file
def test_offsets_of_a_cache_beyond_2_31(tmp_path: Path) -> None:
    """130 tokens almost 2^24 elements apart, as far as no copy is made: new keys, and a page.

    They begin where an offset that wraps still lands in the sparse file.
    """
    stride, tokens = 2**24 - 1, 130
    size = 2**31 + stride * tokens
    path = tmp_path / "storage"
    with path.open("wb") as file:
        file.truncate(2 * size)
    storage = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
    far = storage.as_strided((1, tokens, 1, 16), (0, stride, 16, 1), 2**31)
    near, q = normal(1, tokens, 1, 16).half(), normal(1, 1, 2, 16, seed=1).half()
    far.copy_(near)
    lengths, nothing = torch.tensor([tokens]), torch.tensor([0])
    options: dict[str, Any] = {
        "rotary_cos": torch.rand(tokens, 4),
        "rotary_sin": torch.rand(tokens, 4),
    }

    caches = torch.full((2, 2, 1, tokens, 1, 16), 7.0).half()
    outs = [
        fastattn.attention_with_kv_cache(
            q, *caches[n], nothing, k=new, v=new, **options, backend="triton"
        )
        for n, new in enumerate((far, near))
    ]
    assert torch.equal(*caches) and torch.equal(*outs)

    table = torch.tensor([[0]])
    outs = [
        fastattn.attention_with_kv_cache(q, x, x, lengths, block_table=table, backend="triton")
        for x in (far, near)
    ]
    assert torch.equal(*outs)


# --- strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, backend: str, device: str) -> None:
    """Dense and packed, outputs and gradients; every layout has the values of its copy."""
    shared = {
        "heads": 4, "causal": True, "layout": layout, "dtype": widest(backend), "device": device
    }  # fmt: skip
    check(Case(37, 45, lengths=True, **shared), backend)
    check(Case(packed=((20, 33), (17, 9)), tail=4, **shared), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_one_tensor_and_of_features(backend: str, device: str) -> None:
    """q, k, v interleaved in one tensor; mask and bias transposed, sliced and expanded."""
    q, k, v = normal(2, 37, 3, 4, 16, device=device, backend=backend).unbind(2)
    mask = normal(2, 1, 74, 37, device=device, seed=1)[:, :, ::2].transpose(2, 3) > 0
    bias = normal(4, 37, device=device, seed=2)[None, :, None].expand(2, 4, 37, 37)
    out = fastattn.attention(q, k, v, mask=mask, bias=bias, backend=backend)
    expected, _ = formula(q.double(), k.double(), v.double(), mask=mask, bias=bias.double())
    assert_near(out, expected)


def test_strided_inputs_are_not_copied(device: str) -> None:
    from fastattn.ops.common import launch

    q, k, v = torch.randn(2, 37, 3, 4, 16, device=device).unbind(2)
    bias = torch.randn(1, 1, 1, 37, device=device).expand(2, 4, 37, 37)
    with launch.recorded() as launches:
        fastattn.attention(q, k.expand(2, 37, 4, 16), v, bias=bias, backend="triton")
    pointers = {x.data_ptr() for x in launches[0].args if isinstance(x, torch.Tensor)}
    assert {x.data_ptr() for x in (q, k, v, bias)} <= pointers


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_all_three(backend: str, device: str) -> None:
    x = normal(1, 20, 2, 16, device=device, backend=backend).requires_grad_()
    fastattn.attention(x, x, x, causal=True, backend=backend).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    formula(exact, exact, exact, causal=True)[0].square().sum().backward()
    assert_near(x.grad, exact.grad)
