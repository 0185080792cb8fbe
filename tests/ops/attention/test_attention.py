"""Attention on every backend against float64."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from ops.attention.cases import Case, check, formula

import fastattn

BACKENDS = ("reference", "torch", "triton")

# Each case has its reason.
CASES = {
    "square": Case(65, 65),  # one past a tile of 64
    "causal": Case(130, 130, batch=1, causal=True),  # the diagonal crosses two tiles of 128
    "causal, more keys": Case(33, 140, causal=True),  # bottom-right: a prompt behind a cache
    "causal, fewer keys": Case(140, 33, causal=True),  # 107 rows see no key
    "one query": Case(1, 129, causal=True),  # decoding: sees every key
    "one key": Case(67, 1, causal=True),
    "grouped heads": Case(40, 70, heads=6, kv_heads=2, causal=True),
    "multi-query": Case(17, 30, heads=5, kv_heads=1),  # a prime number of heads on one
    "head_dim 1": Case(20, 20, head_dim=1),
    "head_dim 59": Case(35, 35, head_dim=59, causal=True),  # padded to 64, columns masked
    "head_dim 128": Case(40, 70, batch=1, head_dim=128),
    "head_dim 256": Case(20, 50, batch=1, heads=1, kv_heads=1, head_dim=256, causal=True),
    "scale": Case(50, 50, softmax_scale=0.7, causal=True),
    "mask": Case(70, 90, mask=(0, 0, 0)),
    "mask over heads": Case(30, 45, mask=(0, 1, 0), causal=True),
    "mask over rows": Case(30, 45, mask=(1, 0, 1)),
    "lengths": Case(33, 150, lengths=True),  # NaN and Inf beyond them
    "lengths, causal": Case(140, 140, batch=3, lengths=True, causal=True),
    "everything": Case(35, 71, heads=4, kv_heads=2, head_dim=24, causal=True, mask=(0, 0, 0), lengths=True),
}  # fmt: skip


def dtypes(backend: str, device: str) -> list[torch.dtype]:
    """What the backend can do there; Triton's interpreter has no right bfloat16 dot."""
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    return kinds[:2] if backend == "triton" and device == "cpu" else kinds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_against_float64(name: str, backend: str, dtype: str, device: str) -> None:
    kind = getattr(torch, dtype)
    if kind not in dtypes(backend, device):
        with pytest.raises(fastattn.UnsupportedError, match="bfloat16 dots"):
            check(dataclasses.replace(CASES[name], dtype=kind, device=device), backend)
        return
    check(dataclasses.replace(CASES[name], dtype=kind, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_drawn_problems(seed: int, backend: str, device: str) -> None:
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2, 3))
    case = Case(
        seqlen_q=draw.choice((1, 2, 3, 17, 63, 64, 65, 127, 129)),
        seqlen_k=draw.choice((1, 2, 7, 17, 63, 64, 65, 113, 128, 129, 203)),
        batch=draw.choice((1, 2)),
        heads=kv_heads * draw.choice((1, 2)),
        kv_heads=kv_heads,
        head_dim=draw.choice((1, 8, 16, 32, 40, 59, 64, 80)),
        causal=draw.random() < 0.5,
        mask=draw.choice((None, None, (0, 1, 0), (1, 1, 0))),
        lengths=draw.random() < 0.3,
        dtype=draw.choice((torch.float32, torch.float16)),
        device=device,
        seed=seed,
    )
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty(shape: tuple[int, int, int], backend: str, device: str) -> None:
    batch, seqlen_q, seqlen_k = shape
    q = torch.randn(batch, seqlen_q, 2, 16, device=device, requires_grad=True)
    k = torch.randn(batch, seqlen_k, 2, 16, device=device, requires_grad=True)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_key(backend: str, device: str) -> None:
    """Output 0, LSE -inf, gradients 0, also for extreme logits and a gradient of the LSE."""
    q = (1e4 * torch.randn(1, 9, 2, 16)).to(device).requires_grad_()
    k = torch.randn(1, 4, 2, 16, device=device, requires_grad=True)
    v = torch.randn(1, 4, 2, 16, device=device, requires_grad=True)
    with torch.no_grad():
        out, lse = fastattn.attention(
            q,
            k,
            v,
            causal=True,
            return_lse=True,
            backend="reference" if device == "cuda" and backend == "torch" else backend,
        )
        assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
        assert (lse[:, :, :5] == float("-inf")).all() and lse[:, :, 5:].isfinite().all()
    out = fastattn.attention(q, k, v, causal=True, backend=backend)
    out.sum().backward()
    assert torch.equal(q.grad[:, :5], torch.zeros_like(q.grad[:, :5]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_negative_logits(backend: str, device: str) -> None:
    """An LSE far below -88.7, where exp(lse) underflows, with a mask and seqlen_k % 128 == 64."""
    q = torch.full((1, 3, 1, 16), 30.0, device=device)
    k = -torch.rand(1, 192, 1, 16, generator=torch.Generator().manual_seed(0)).to(device) - 1
    v = torch.randn(1, 192, 1, 16, generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.rand(1, 1, 3, 192, generator=torch.Generator().manual_seed(2)).to(device) > 0.5
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, mask=mask, backend=backend)
    out.square().sum().backward()
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    expected, lse = formula(*doubles, causal=False, softmax_scale=None, mask=mask)
    expected.square().sum().backward()
    assert lse.max() < -88.7
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(leaves, doubles):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, device: str) -> None:
    """Transposed, expanded, sliced, and interleaved inputs give what their copies give."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 37, 3, 4, 16, generator=g).to(device)
    layouts = {
        "packed qkv": qkv.unbind(2),
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(2)],
        "expanded batch and heads": [x[:1, :, :1].expand(2, 37, 4, 16) for x in qkv.unbind(2)],
        "every other token": [x[:, ::2] for x in qkv.unbind(2)],
        "last dimension strided": [x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv.unbind(2)],
    }  # fmt: skip
    mask = torch.rand(1, 1, 37, 37, generator=g).to(device) > 0.3
    for name, (q, k, v) in layouts.items():
        seen = mask[:, :, : q.shape[1], : k.shape[1]].transpose(2, 3)
        out = fastattn.attention(q, k, v, mask=seen, backend=backend)
        copies = (x.contiguous() for x in (q, k, v))
        expected = fastattn.attention(*copies, mask=seen.contiguous(), backend=backend)
        torch.testing.assert_close(out, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_strided_inputs_are_not_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.ops.common import launch

    seen = []
    original = launch.launch
    monkeypatch.setattr(
        launch,
        "launch",
        lambda kernel, grid, *a, **c: (seen.append(a), original(kernel, grid, *a, **c)),
    )
    qkv = torch.randn(2, 37, 3, 4, 16, device=device)
    q, k, v = qkv.unbind(2)
    fastattn.attention(q, k.expand(2, 37, 4, 16), v, backend="triton")
    assert [x.data_ptr() for x in seen[0][:3]] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend: str, device: str) -> None:
    case = Case(70, 131, heads=4, kv_heads=2, causal=True, device=device)
    (q, k, v), options = case.inputs()
    dout, _ = case.cotangents()

    def run() -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, **options, backend=backend)
        out.backward(dout)
        return [out, *(x.grad for x in leaves)]

    first = run()
    for _ in range(2 if device == "cpu" else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_batch_invariance(device: str) -> None:
    """A sequence's output has the same bits alone and within a batch."""
    (q, k, v), _ = Case(40, 90, batch=3, device=device).inputs()
    whole = fastattn.attention(q, k, v, causal=True, backend="triton")
    alone = fastattn.attention(q[1:2], k[1:2], v[1:2], causal=True, backend="triton")
    assert torch.equal(whole[1:2], alone)


def test_dropout(device: str) -> None:
    """Seeded; keeps the mean; drops the stated share; one mask in forward and backward."""
    q = torch.zeros(1, 64, 4, 16, device=device, requires_grad=True)
    k = torch.zeros(1, 256, 4, 16, device=device)
    v = torch.ones(1, 256, 4, 16, device=device, requires_grad=True)
    for backend in ("torch", "reference"):
        torch.manual_seed(5)
        out = fastattn.attention(q, k, v, dropout_p=0.25, backend=backend)
        torch.manual_seed(5)
        again = fastattn.attention(q, k, v, dropout_p=0.25, backend=backend)
        assert torch.equal(out, again)
        assert abs(out.mean().item() - 1.0) < 0.02
        kept = out.detach() * 0.75 * 256  # uniform softmax: the number of kept keys
        torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-2)
        assert abs(kept.mean().item() / 256 - 0.75) < 0.02
        (dv,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(dv.sum(), out.sum())
    with pytest.raises(fastattn.UnsupportedError, match="no dropout"):
        fastattn.attention(q, k, v, dropout_p=0.25, backend="triton")


def test_autocast(device: str) -> None:
    q = torch.randn(1, 8, 2, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = fastattn.attention(q, q, q, causal=True)
        assert out.dtype == torch.bfloat16
        mixed = fastattn.attention(q, q.bfloat16(), q.half(), causal=True)
        assert mixed.dtype == torch.bfloat16
        assert fastattn.attention(q.double(), q.double(), q.double()).dtype == torch.float64
        # The definition stays as precise as outside.
        inside = fastattn.attention(q, q, q, backend="reference")
    rounded = q.bfloat16()
    assert torch.equal(inside, fastattn.attention(rounded, rounded, rounded, backend="reference"))


def test_memory_is_linear_in_the_sequence_length() -> None:
    """Bytes kept for the backward, and the largest allocation of any step."""
    from torch.profiler import ProfilerActivity, profile

    def saved(seqlen: int) -> int:
        kept = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        q = torch.randn(1, seqlen, 1, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            fastattn.attention(q, q, q, causal=True)
        return kept

    def allocated(seqlen: int, seqlen_k: int) -> int:
        q, k = torch.randn(1, seqlen, 1, 16), torch.randn(1, seqlen_k, 1, 16)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            fastattn.attention(q, k, k, causal=True)
        return max(event.cpu_memory_usage for event in prof.events())

    assert saved(8192) <= 2.1 * saved(4096)
    assert (
        allocated(8192, 8192) < 8192 * 8192
    )  # bytes; a matrix of fp32 scores has four times as many
    # Unequal lengths: a mask of one chunk of rows, never of all.
    assert allocated(4096, 8192) < 4096 * 8192


def test_kernel_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Triton launchers allocate: outputs and two floats a row, at lengths no matrix fits."""
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.common import launch

    tensors: list[torch.Tensor] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *a, **c: tensors.extend(a))
    seqlen = 2**20
    q = torch.empty(1, seqlen, 2, 64, dtype=torch.float16, device="meta")
    out, lse = kernels.forward(q, q, q, None, None, True, 0.1)
    kernels.backward(out, lse, q, q, q, None, None, out, lse, True, 0.1)
    sizes = [x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)]
    assert max(sizes) == q.numel() * 2


def test_large_grids_and_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """batch * heads beyond 65535 and offsets beyond 2^31: one grid axis, 64-bit strides."""
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.common import launch

    grids = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *a, **c: grids.append(grid))
    q = torch.empty(4096, 128, 32, 64, dtype=torch.float16, device="meta")
    out, lse = kernels.forward(q, q, q, None, None, True, 0.1)
    kernels.backward(out, lse, q, q, q, None, None, out, lse, True, 0.1)
    assert all(len(grid) == 1 and 65535 < grid[0] < 2**31 for grid in grids)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a file stands behind the tensor: CPU only")
def test_offsets_beyond_2_31(tmp_path: Path) -> None:
    """Views with a batch stride of 2^31 elements over a sparse file, of which two pages are touched."""
    stride = 2**31
    path = tmp_path / "storage"
    with path.open("wb") as file:
        file.truncate(2 * (stride + 64))
    storage = torch.from_file(str(path), shared=True, size=stride + 64, dtype=torch.float16)
    far = storage.as_strided((2, 2, 1, 16), (stride, 16, 16, 1))
    near = torch.randn(2, 2, 1, 16).half()
    far.copy_(near)
    out = fastattn.attention(far, far, far, backend="triton")
    assert torch.equal(out, fastattn.attention(near, near, near, backend="triton"))
