"""Attention in 16 bits that a CPU computes in float32: where, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import fastattn
from fastattn.measured import Faster
from fastattn.ops.attention import sdpa as module
from oracle import assert_close_to_reference

HALF, BF16 = torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")


@pytest.fixture(autouse=True)
def as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which there are rows."""
    row = Faster("16 bits", "2000-01-01", 4096)
    bounded = row._replace(most=8 * 8 * 100 - 1)
    rows = {(HALF, False): row, (HALF, True): row, (BF16, True): bounded}
    monkeypatch.setattr(module, "FASTER", rows)


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Those that ATen computes in, in order."""
    seen: list[torch.dtype] = []

    def spy(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(q.dtype)
        assert not torch.is_autocast_enabled("cpu") or q.dtype != torch.float32
        return run(q, *args, **options)

    run = module.SDPA
    monkeypatch.setattr(module, "SDPA", spy)
    return seen


def qkv(dtype: torch.dtype, seqlen: int, head_dim: int = 8, grad: bool = False) -> Any:
    shape = 2, seqlen, 3, head_dim
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(3)]


@pytest.mark.parametrize(
    ("dtype", "seqlen", "head_dim", "grad", "expected"),
    [
        (HALF, 22, 8, False, HALF),  # 3872 multiplications
        (HALF, 23, 8, False, torch.float32),
        (HALF, 23, 8, True, torch.float32),
        (HALF, 8, 100, True, torch.float32),
        (BF16, 23, 8, False, BF16),
        (BF16, 23, 8, True, torch.float32),
        (BF16, 8, 100, True, BF16),
        (torch.float32, 23, 8, True, torch.float32),
    ],
)
def test_where(
    dtype: torch.dtype, seqlen: int, head_dim: int, grad: bool, expected: torch.dtype,
    dtypes: list[torch.dtype],
) -> None:  # fmt: skip
    out = fastattn.attention(*qkv(dtype, seqlen, head_dim, grad), causal=True)
    assert out.dtype == dtype and dtypes == [expected]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (7, 0)},
    "mask": {"mask": torch.rand(1, 1, 23, 23) < 0.7},
    "bias": {"bias": torch.randn(1, 3, 23, 23)},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4])},
    "lengths": {"key_lengths": torch.tensor([23, 21])},
}


@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients(name: str, dtype: torch.dtype, dtypes: list[torch.dtype]) -> None:
    """By the rule, against what ATen makes of it in 16 bits; a bias has the dtype of q."""
    options, dout = dict(OPTIONS[name]), torch.randn(2, 23, 3, 8).to(dtype)
    if name == "bias":
        options["bias"] = options["bias"].to(dtype)
    leaves = qkv(dtype, 23, grad=True)

    def run(tensors: Any, cotangent: torch.Tensor, **how: Any) -> Any:
        out = fastattn.attention(*tensors, **options, **how)
        return [out, *torch.autograd.grad(out, tensors, cotangent)]

    ours = run(leaves, dout, backend="torch")
    assert torch.float32 in dtypes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FASTER", {})
        eager = run(leaves, dout, backend="torch")
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options = {k: v.double() if k == "bias" else v for k, v in options.items()}
    exact = run(doubles, dout.double(), backend="reference")
    for value, measure, reference in zip(ours, eager, exact, strict=True):
        assert value.dtype == dtype
        assert_close_to_reference(value, measure, reference)


def test_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(HALF, 23)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, backend="torch")
    exact = fastattn.attention(
        q.double(), k.double(), v.double(), causal=True, return_lse=True, backend="reference"
    )
    assert (out.dtype, lse.dtype) == (HALF, torch.float32)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)  # not of 16 bits
    assert torch.equal(out, exact[0].half())


def test_under_autocast(dtypes: list[torch.dtype]) -> None:
    """It would cast the float32 copies back."""
    q, k, v = qkv(torch.float32, 23, grad=True)
    with torch.autocast("cpu", BF16):
        out = fastattn.attention(q, k, v, causal=True)
    assert (out.dtype, dtypes) == (BF16, [torch.float32])
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_on_a_cache(dtypes: list[torch.dtype]) -> None:
    keys, values = (torch.zeros(2, 600, 3, 8, dtype=HALF) for _ in "kv")
    keys[:, :550], values[:, :550] = torch.randn(2, 550, 3, 8), torch.randn(2, 550, 3, 8)
    q, k, v = (torch.randn(2, 1, 3, 8).half() for _ in "qkv")
    lengths = torch.tensor([550, 550])
    with torch.no_grad():
        out = fastattn.attention_with_kv_cache(q, keys, values, lengths, k=k, v=v)
    assert dtypes == [torch.float32] and out.dtype == HALF
    exact = F.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, keys[:, :551], values[:, :551]))
    )
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=2e-3, atol=2e-3)


def test_a_graph_is_tied_to_no_length() -> None:
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: fastattn.attention(q, k, v, causal=True),
        fullgraph=True, dynamic=True, backend=compilations,
    )  # fmt: skip
    compiled(*qkv(HALF, 9))
    graphs = compilations.frame_count
    for seqlen in (23, 9, 40):
        tensors = qkv(HALF, seqlen)
        out = fastattn.attention(*tensors, causal=True)
        torch.testing.assert_close(compiled(*tensors), out, rtol=2e-3, atol=2e-3)
    assert compilations.frame_count == graphs
