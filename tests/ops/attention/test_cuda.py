"""The `cuda` backend of attention; without a GPU its kernels run in the emulator."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.attention import test_fuzz, test_holes
from ops.attention.cases import Case, call, check, poisoned, refusal
from ops.attention.test_attention import CASES

import fastattn
from fastattn.ops.attention import cuda
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.problem import check as check_call
from fastattn.ops.attention.problem import describe

DTYPES = ("float16", "bfloat16")
KERNELS = ("attention_forward", "attention_delta", "attention_keys", "attention_queries")


@pytest.fixture(autouse=True)
def _checked(emulator: Emulator) -> Iterator[None]:
    yield
    emulator.checks(1)


def of_dtype(case: Case, dtype: str, device: str = "cpu") -> Case:
    return dataclasses.replace(case, dtype=getattr(torch, dtype), device=device)


def results(case: Case) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v and sink."""
    problem = case.draw()
    tensors = poisoned(case, problem)
    leaves = {n: x.detach().requires_grad_(n != "bias") for n, x in tensors.items()}
    torch.manual_seed(case.seed)
    outputs = call(case, problem, "cuda", leaves, return_lse=True)
    torch.autograd.backward(outputs, [problem.dout, problem.dlse])
    return [*outputs, *(x.grad for x in leaves.values() if x.grad is not None)]


# --- against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: str, device: str, emulator: Emulator) -> None:
    """The table of all backends: what this one claims runs on its kernels, forward and backward."""
    case = of_dtype(CASES[name], dtype, device)
    emulator.seed(list(CASES).index(name))
    emulator.checks(int(dtype == "float16"))  # once with all of them
    counts = emulator.counts(lambda: check(case, "cuda"))
    if counts is not None and refusal(case, "cuda") is None:
        assert all(counts[kernel]["launches"] for kernel in KERNELS), counts


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", (False, True), ids=("plain", "full"))
@pytest.mark.parametrize("name", WIDTHS)
def test_widths(name: str, full: bool, dtype: str, device: str, emulator: Emulator) -> None:
    emulator.seed(1000 + int(name))
    case = of_dtype(WIDTHS[name], dtype, device)
    check(dataclasses.replace(case, **FULL) if full else case, "cuda")


def runnable(seed: int, device: str) -> Case:
    """The fuzzer's case of a seed, as this backend takes it."""
    case = test_fuzz.draw(seed, device)
    random_ = random.Random(seed)
    widths = {
        name: width if width is None or width <= 256 else 256
        for name, width in (("head_dim", case.head_dim), ("head_dim_v", case.head_dim_v))
    }
    dtype = getattr(torch, random_.choice(DTYPES))
    return dataclasses.replace(case, **widths, dtype=dtype, documents=None, block_mask=None)


@pytest.mark.parametrize("first", range(0, 40, 5))
def test_drawn(first: int, device: str, emulator: Emulator) -> None:
    """Features combined; the case of a seed stands in the traceback."""
    emulator.checks(0)
    for seed in range(first, first + 5):
        emulator.seed(seed)
        case = runnable(seed, device)
        try:
            check(case, "cuda")
        except Exception as error:
            raise AssertionError(f"seed {seed}: {test_fuzz.shortly(case)}") from error


# --- the kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    (
        Case(70, 70, batch=1, head_dim=64, causal=True, heads=4),
        Case(40, 70, batch=1, head_dim=128, window=(30, 5), softcap=5.0, dropout_p=0.2, mask=(0, 1, 0, 0)),
        Case(packed=((20, 30), (35, 10)), head_dim=40, used=True, tail=3),
    ),
    ids=("plain", "full", "packed"),
)  # fmt: skip
def test_schedules_give_the_same_bits(case: Case, device: str, emulator: Emulator) -> None:
    case = of_dtype(case, "bfloat16", device)
    emulator.seed(0)
    first = results(case)
    for seed in range(1, 5):
        emulator.seed(seed)
        for ours, other in zip(results(case), first):
            assert torch.equal(ours, other)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("features", ({}, FULL), ids=("plain", "full"))
def test_no_bank_conflicts(
    head_dim: int, features: dict[str, Any], device: str, emulator: Emulator
) -> None:
    """Tiles are copied, read by ldmatrix and stored by way of shared memory without a conflict."""
    case = of_dtype(Case(70, 70, batch=1, head_dim=head_dim, **features), "float16", device)
    counts = emulator.counts(lambda: results(case))
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
        counts = emulator.counts(functools.partial(results, of_dtype(case, "float16", device)))
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
        return (
            out,
            lse,
            *cuda.backward(q, None, out, lse, False, False, q, k, k, extras, settings)[:3],
        )

    expected = outputs([0, 10, 30], [7, 20], torch.int32)
    assert not expected[0].isnan().any()
    wrong = outputs([-5, 10, 90], [7, 2**31 - 1], torch.int32)
    wide = outputs([-(2**40), 10, 2**40], [7, 2**33], torch.int64)
    for results_ in (outputs([0, 10, 30], [7, 20], torch.int64), wrong, wide):
        for ours, other in zip(results_, expected):
            assert torch.equal(ours, other)


def test_wide_strides(device: str, emulator: Emulator) -> None:
    """Rows at odd places are read element by element, to the same result."""
    aligned = torch.randn(1, 40, 2, 64, device=device).half()
    wide = torch.randn(1, 40, 2, 67, device=device).half()
    odd = wide[..., 1:65].copy_(aligned)
    for features in ({"causal": True}, {"softcap": 3.0}):
        expected, ours = (
            fastattn.attention(x, x, x, backend="cuda", **features) for x in (aligned, odd)
        )
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("softcap", (0.0, 5.0), ids=("plain", "full"))
def test_blind_rows_take_no_gradient(softcap: float, device: str, emulator: Emulator) -> None:
    """Whatever arrives as the gradient of a row that sees no key, none of it reaches an input."""
    q, k = (torch.randn(1, n, 2, 64, device=device).half() for n in (100, 40))
    blind = 100 - 40
    gradients = []
    for poison in (0.0, torch.inf, torch.nan):
        leaves = [x.detach().requires_grad_() for x in (q, k, k)]
        out, lse = fastattn.attention(
            *leaves, causal=True, softcap=softcap, return_lse=True, backend="cuda"
        )
        assert torch.equal(out[:, :blind], torch.zeros_like(out[:, :blind]))
        dout, dlse = torch.ones_like(out), torch.ones_like(lse)
        dout[:, :blind], dlse[..., :blind] = poison, poison
        gradients.append(torch.autograd.grad((out, lse), leaves, (dout, dlse)))
    for poisoned_ in gradients[1:]:
        for ours, other in zip(poisoned_, gradients[0]):
            assert torch.equal(ours, other)


def test_smallest_bias(device: str, emulator: Emulator) -> None:
    """Masks made of the smallest number hide keys, but of a row that is all of them none."""
    q, k, v = (torch.randn(1, 20, 1, 16, device=device).half() for _ in range(3))
    for dtype in (torch.float16, torch.float32):
        bias = torch.zeros(1, 1, 20, 20, dtype=dtype, device=device)
        bias[..., 12:] = torch.finfo(dtype).min
        out = fastattn.attention(q, k, v, bias=bias, backend="cuda")
        assert torch.equal(out, fastattn.attention(q, k[:, :12], v[:, :12], backend="cuda"))
    bias = torch.full((1, 1, 20, 20), torch.finfo(torch.float32).min, device=device)
    out = fastattn.attention(q, k, v, bias=bias, backend="cuda")
    torch.testing.assert_close(
        out.float(), v.float().mean(1, keepdim=True).expand_as(out), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("softcap", (1e-300, 1e-50, 1e-42, 1e30, 1e39, 1e300))
def test_softcaps_that_float32_does_not_hold(
    softcap: float, device: str, emulator: Emulator
) -> None:
    q, k, v, dout = (torch.randn(1, n, 1, 16, device=device).half() for n in (9, 20, 20, 9))
    results_ = []
    for backend, dtype in (("cuda", torch.float16), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, softcap=softcap, backend=backend)
        results_.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    for ours, exact in zip(*results_):
        torch.testing.assert_close(ours.double(), exact, atol=3e-3, rtol=3e-3)


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
        (dout.detach(), None, out, lse, False, False, *call_),
        test_utils=("test_schema", "test_faketensor"),
    )


# --- what it does not do --------------------------------------------------------------------------


def test_bias_with_a_gradient(device: str, emulator: Emulator) -> None:
    q = torch.randn(1, 8, 2, 16, device=device).half().requires_grad_()
    bias = torch.randn(1, 2, 8, 8, device=device).half()
    fastattn.attention(q, q, q, bias=bias, backend="cuda").sum().backward()
    bias.requires_grad_()
    with pytest.raises(fastattn.UnsupportedError, match="no gradient for bias"):
        fastattn.attention(q, q, q, bias=bias, backend="cuda")
    with torch.no_grad():
        fastattn.attention(q, q, q, bias=bias, backend="cuda")


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 8, 2, 264), {}, "head_dim 264 is above 256"),
        ((1, 8, 2, 16), {"document_ids": torch.zeros(1, 8, dtype=torch.int32)}, "no documents"),
    ],
)
def test_refuses(
    shape: tuple[int, ...], options: dict[str, Any], reason: str, device: str, emulator: Emulator
) -> None:
    q = torch.randn(*shape, device=device).half()
    options = {n: x.to(device) for n, x in options.items()}
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        fastattn.attention(q, q, q, backend="cuda", **options)


@pytest.mark.parametrize("name", test_holes.GAPS)
def test_gaps_between_packed_sequences(name: str, device: str, emulator: Emulator) -> None:
    test_holes.check_gaps(name, "cuda", device)
