"""The `cuda` backend of attention; without a GPU its kernels run in the emulator."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.attention.cases import Case, check

import fastattn
from fastattn.ops.attention import cuda
from fastattn.ops.attention.call import NO_GRADIENT, Extras
from fastattn.ops.attention.problem import check as check_call
from fastattn.ops.attention.problem import describe

KERNELS = ("attention_forward", "attention_delta", "attention_keys", "attention_queries")


def of_dtype(case: Case, dtype: str, device: str = "cpu") -> Case:
    return dataclasses.replace(case, dtype=getattr(torch, dtype), device=device)


# Every instantiation in both dtypes: a width that fills it, one that does not, one that is no
# multiple of 8 elements; and lengths around the tiles' edges.
WIDTHS = {
    "16": Case(33, 65, head_dim=16, causal=True),
    "40": Case(70, 1, head_dim=40, head_dim_v=64),
    "59": Case(1, 70, head_dim=59, heads=4),
    "64": Case(65, 129, batch=1, head_dim=64, heads=2, kv_heads=1, causal=True),
    "96": Case(17, 64, batch=1, head_dim=96, window=(20, 3)),
    "111": Case(31, 33, batch=1, head_dim=111, head_dim_v=128, lengths=True),
    "128": Case(63, 70, batch=1, head_dim=128, heads=2, kv_heads=1, causal="top_left"),
    "160": Case(35, 20, batch=1, head_dim=160, head_dim_v=256, kv_heads=1),
    "256": Case(19, 49, batch=1, head_dim=256, kv_heads=1, causal=True, sink=True),
}
FULL = {"softcap": 4.0, "alibi": "heads", "bias": (0, 1, 0, 0), "dropout_p": 0.3}


@pytest.mark.parametrize("dtype", ("float16", pytest.param("bfloat16", marks=pytest.mark.long)))
@pytest.mark.parametrize("full", (False, True), ids=("plain", "full"))
@pytest.mark.parametrize("name", WIDTHS)
def test_widths(name: str, full: bool, dtype: str, device: str, emulator: Emulator) -> None:
    emulator.seed(1000 + int(name))
    case = of_dtype(WIDTHS[name], dtype, device)
    check(dataclasses.replace(case, **FULL) if full else case, "cuda")


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("features", ({}, FULL), ids=("plain", "full"))
def test_no_bank_conflicts(
    head_dim: int, features: dict[str, Any], device: str, emulator: Emulator
) -> None:
    """Tiles are copied, read by ldmatrix and stored by way of shared memory without a conflict."""
    case = of_dtype(Case(70, 70, batch=1, head_dim=head_dim, **features), "float16", device)
    counts = emulator.counts(lambda: check(case, "cuda"))
    if counts is None:
        pytest.skip("a GPU does not count them here")
    for kernel in KERNELS:
        assert counts[kernel]["bank_conflicts"] == 0, (kernel, counts[kernel])
        assert kernel == "attention_delta" or counts[kernel]["shared_accesses"] > 0
        assert kernel == "attention_delta" or counts[kernel]["load_matrices"] > 0


def test_work_follows_the_band(device: str, emulator: Emulator) -> None:
    """Tiles that nobody sees are not visited: causal attention takes half of the products."""
    products = []
    for causal in (False, True):
        case = Case(512, 512, batch=1, heads=1, kv_heads=1, causal=causal)
        case = of_dtype(case, "float16", device)
        counts = emulator.counts(functools.partial(check, case, "cuda"))
        if counts is None:
            pytest.skip("a GPU does not count them here")
        products.append([counts[kernel]["mma"] for kernel in KERNELS if "delta" not in kernel])
    for whole, half in zip(*products):
        assert half <= 0.65 * whole


def test_lengths_of_any_integer(device: str, emulator: Emulator) -> None:
    """int32 and int64, and contents that point outside are cut to the tensor."""
    q, k = (torch.randn(30, 2, 16, device=device).half() for _ in range(2))
    settings = describe(q[None], k[None], k[None]).settings
    settings = settings._replace(max_seqlen_q=30, max_seqlen_k=30)

    def outputs(starts: list[int], used: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        cu = torch.tensor(starts, device=device).to(dtype)
        lengths = torch.tensor(used, device=device).to(dtype)
        extras = Extras(cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=lengths)
        out, lse = cuda.forward(q, k, k, extras, settings)
        grads = cuda.backward(q, None, out, lse, NO_GRADIENT, q, k, k, extras, settings)
        return out, lse, *grads[:3]

    expected = outputs([0, 10, 30], [7, 20], torch.int32)
    assert not expected[0].isnan().any()
    wrong = outputs([-5, 10, 90], [7, 2**31 - 1], torch.int32)
    wide = outputs([-(2**40), 10, 2**40], [7, 2**33], torch.int64)
    for results_ in (outputs([0, 10, 30], [7, 20], torch.int64), wrong, wide):
        for ours, other in zip(results_, expected):
            assert torch.equal(ours, other)


def test_max_seqlen_is_a_bound(device: str, emulator: Emulator) -> None:
    """However far above the sequences it lies, the grid is no larger than theirs."""
    cu = torch.tensor([0, 5, 5, 20], device=device).int()
    leaves = [torch.randn(20, 2, 16, device=device).half().requires_grad_() for _ in range(3)]

    def run(longest: int) -> list[torch.Tensor]:
        out = fastattn.attention_varlen(*leaves, cu, cu, longest, longest, backend="cuda")
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    assert all(map(torch.equal, run(15), run(cuda.MAX_SEQLEN)))


def test_more_tokens_than_32_bits_count(device: str, emulator: Emulator) -> None:
    q, k = torch.randn(5, 1, 8, device=device).half(), torch.randn(1, 1, 8, device=device).half()
    k = k.expand(2**31 + 8, 1, 8)
    cu = torch.tensor([0, 5], device=device)
    with pytest.raises(RuntimeError, match="less than 2\\^31 tokens"):
        fastattn.attention_varlen(q, k, k, cu, cu, 5, 5, backend="cuda")


@pytest.mark.parametrize("strided", (False, True))
def test_opcheck(strided: bool, device: str, emulator: Emulator) -> None:
    """Schemas, and strides of the outputs as the fake implementations have them."""

    def normal(n: int) -> torch.Tensor:
        x = torch.randn(2, 2, n, 16, device=device).half()
        return (x.transpose(1, 2) if strided else x.view(2, n, 2, 16)).requires_grad_()

    q, k, v, dout = (normal(n) for n in (9, 20, 20, 9))
    settings, extras = check_call(q, k, v, causal=True)
    call_ = (q, k, v, *extras, *settings, "cuda", True)
    torch.library.opcheck(torch.ops.fastattn.attention.default, call_)
    out, lse = (x.detach() for x in torch.ops.fastattn.attention(*call_))
    torch.library.opcheck(
        torch.ops.fastattn.attention_backward.default,
        (dout.detach(), None, out, lse, [False, False], *call_),
        test_utils=("test_schema", "test_faketensor"),
    )
