"""Attention on every backend against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from ops import laws
from ops.attention.cases import Case, check, check_forward, refusal, runnable
from ops.backends import BACKENDS

import fastattn
from fastattn.ops.attention import aten
from fastattn.ops.attention.call import NO_GRADIENT, Extras
from fastattn.ops.attention.problem import describe

# Each case has its reason. A backend that does not do one has to say so.
CASES = {
    # --- shapes and heads
    "square": Case(65, 65),  # one past a tile of 64
    "one query": Case(1, 129, causal=True),  # decoding: sees every key
    "one key": Case(67, 1, causal=True),
    "grouped heads": Case(40, 70, heads=6, kv_heads=2, causal=True),
    "multi-query": Case(17, 30, heads=5, kv_heads=1),  # a prime number of heads on one
    "head_dim 1": Case(20, 20, head_dim=1),
    "head_dim 59": Case(35, 35, head_dim=59, causal=True),  # padded to 64, columns masked
    "head_dim 128": Case(40, 70, batch=1, head_dim=128),
    "head_dim 256": Case(20, 50, batch=1, heads=1, kv_heads=1, head_dim=256, causal=True),
    "head_dim 512": Case(17, 33, batch=1, heads=1, kv_heads=1, head_dim=512, causal=True),
    "wider v": Case(33, 40, head_dim=24, head_dim_v=72, causal=True),  # 32 and 128 padded
    "narrower v": Case(33, 40, head_dim=192, head_dim_v=128, batch=1, causal=True),  # DeepSeek's
    "v of width 1": Case(20, 35, head_dim=40, head_dim_v=1),
    # --- causality and windows
    "causal": Case(130, 130, batch=1, causal=True),  # the diagonal crosses two tiles of 128
    "causal, more keys": Case(33, 140, causal=True),  # bottom-right: a prompt behind a cache
    "causal, fewer keys": Case(140, 33, causal="bottom_right"),  # 107 rows see no key
    "top-left, more keys": Case(40, 140, causal="top_left"),  # 100 keys are seen by none
    "top-left, fewer keys": Case(140, 40, causal="top_left"),  # the last 100 rows see all
    "window": Case(150, 150, batch=1, window=(20, 10)),  # tiles are cut on both sides
    "window, left open": Case(70, 100, window=(-1, 3)),
    "window, right open": Case(70, 100, window=(3, -1)),
    "window, causal": Case(100, 140, window=(17, 5), causal=True),  # the right side ends at 0
    "window of the diagonal": Case(70, 70, window=(0, 0)),  # one key a row
    "window, top-left": Case(90, 50, window=(9, 4), causal="top_left"),  # rows past it are blind
    "window past the keys": Case(140, 20, window=(4, 4)),  # bottom-right: rows before it are blind
    "window without bounds": Case(20, 30, window=(-1, -1)),
    # --- the scores
    "scale": Case(50, 50, softmax_scale=0.7, causal=True),
    "negative scale": Case(50, 50, softmax_scale=-0.4, causal=True),  # a row's maximum turns
    "zero scale": Case(33, 40, softmax_scale=0.0, causal=True),  # uniform, no gradient to q, k
    "softcap": Case(50, 70, softcap=2.0, causal=True),  # most scores in the bend
    "softcap, mild": Case(50, 70, softcap=30.0),  # as Gemma 2 has it
    "alibi": Case(65, 80, alibi="heads", causal=True),
    "alibi by batch": Case(80, 65, alibi="batch"),  # no causality: |i - j| to both sides
    "alibi, top-left": Case(40, 70, alibi="heads", causal="top_left"),  # distances stay bottom-right
    "bias": Case(40, 70, bias=(0, 0, 0, 0)),
    "bias over batch": Case(40, 70, bias=(1, 0, 0, 0), causal=True),  # T5's relative positions
    "bias over heads": Case(40, 70, bias=(0, 1, 0, 0)),
    "bias over rows": Case(40, 70, bias=(0, 0, 1, 0)),
    "bias over keys": Case(40, 70, bias=(0, 0, 0, 1)),  # changes only the LSE
    "bias of a key": Case(40, 70, bias=(1, 1, 1, 0)),
    "bias of one number": Case(40, 70, bias=(1, 1, 1, 1)),
    "bias in float32": Case(40, 70, bias=(1, 0, 0, 0), sink=True, in_float32=True),
    "bias, grouped heads": Case(35, 40, heads=4, kv_heads=2, bias=(0, 0, 0, 0), causal=True),
    "sink": Case(40, 70, sink=True),
    "sink, blind rows": Case(70, 40, sink=True, causal=True),  # LSE is the sink's, out 0
    # --- masks
    "mask": Case(70, 90, mask=(0, 0, 0, 0)),
    "mask over heads": Case(30, 45, mask=(0, 1, 0, 0), causal=True),
    "mask over rows": Case(30, 45, mask=(1, 0, 1, 0)),
    "mask over keys": Case(30, 45, mask=(0, 0, 0, 1)),  # whole rows are hidden
    "lengths": Case(33, 150, lengths=True),  # NaN and Inf beyond them
    "lengths, causal": Case(140, 140, batch=3, lengths=True, causal=True),
    "lengths, window": Case(40, 70, batch=3, lengths=True, window=(20, 9)),
    "lengths, wider v": Case(20, 40, batch=4, lengths=True, head_dim=8, head_dim_v=24, seed=3),
    "documents": Case(100, 100, documents="sorted", causal=True),
    "documents, two lengths": Case(50, 140, documents="sorted"),
    "documents, scattered": Case(70, 70, documents="scattered"),  # no tile can be skipped
    "block mask": Case(100, 150, block_mask=(32, 64)),
    "block mask, fine": Case(50, 60, block_mask=(16, 16), causal=True),  # finer than any tile
    "block mask, coarse": Case(140, 140, batch=1, block_mask=(128, 128)),  # coarser than fp32's
    # --- dropout and precision
    "dropout": Case(40, 70, dropout_p=0.3),
    "dropout, causal": Case(40, 70, dropout_p=0.75, causal=True, heads=4),
    "dropout, one row of tiles": Case(3, 203, dropout_p=0.01),  # a share that is hardly there
    "three products of tf32": Case(40, 70, fp32_precision="tf32x3", causal=True),
    "any order": Case(140, 300, deterministic=False, heads=4, kv_heads=2),
    # --- packed sequences
    "packed": Case(packed=((40, 40), (1, 70), (17, 5))),
    "packed, causal": Case(packed=((40, 40), (33, 5), (5, 70)), causal=True),  # blind rows inside
    "packed, empty ones": Case(packed=((0, 5), (7, 0), (0, 0), (9, 9)), causal=True),
    "packed, tail": Case(packed=((20, 30), (35, 10)), tail=13),  # tokens of no sequence, NaN
    "packed, seqused": Case(packed=((40, 50), (60, 70), (8, 9)), used=True, causal=True, tail=3),
    "packed, window": Case(packed=((70, 70), (30, 90)), window=(9, 3)),
    "packed, top-left": Case(packed=((40, 20), (20, 40)), causal="top_left"),
    "packed, bias": Case(packed=((20, 30), (35, 10)), bias=(0, 0, 0, 0)),
    "packed, bias over batch": Case(packed=((20, 30), (35, 10)), bias=(1, 0, 0, 0), causal=True),
    "packed, alibi": Case(packed=((20, 30), (35, 10)), alibi="batch"),
    "packed, sink and softcap": Case(packed=((20, 30), (35, 10)), sink=True, softcap=3.0, causal=True),
    "packed, mask": Case(packed=((20, 30), (35, 10)), mask=(0, 1, 0, 0)),
    "packed, documents": Case(packed=((50, 50), (35, 80)), documents="sorted"),
    "packed, block mask": Case(packed=((50, 70), (35, 20)), block_mask=(16, 32)),
    "packed, dropout": Case(packed=((20, 30), (35, 10)), dropout_p=0.4),
    "packed, wider v": Case(packed=((20, 30), (35, 10)), head_dim=16, head_dim_v=40),
    # --- all of them
    "everything": Case(
        35, 71, heads=4, kv_heads=2, head_dim=24, head_dim_v=40, window=(30, 2), softmax_scale=0.3,
        softcap=5.0, bias=(0, 1, 0, 0), sink=True, mask=(0, 0, 0, 0), alibi="batch", lengths=True,
        documents="sorted", dropout_p=0.2,
    ),
    "everything that ATen has": Case(
        35, 71, heads=4, kv_heads=2, head_dim=24, head_dim_v=40, causal=True, softmax_scale=0.3,
        bias=(0, 1, 0, 0), mask=(0, 0, 0, 0), alibi="batch", lengths=True, documents="sorted",
        block_mask=(16, 16), dropout_p=0.2,
    ),
    "everything, packed": Case(
        packed=((35, 71), (60, 33), (2, 9)), used=True, tail=5, heads=4, kv_heads=2, head_dim=24,
        head_dim_v=40, causal=True, softcap=5.0, bias=(1, 0, 0, 0), sink=True, mask=(0, 0, 1, 0),
        alibi="heads", documents="sorted", block_mask=(32, 16), dropout_p=0.2,
    ),
}  # fmt: skip


# `long`: what the kernels round to changes no mask and no feature.
SECOND = {("float16", "triton"), ("bfloat16", "cuda")}
OF_DTYPE = [
    pytest.param(dtype, backend, marks=[pytest.mark.long] * ((dtype, backend) in SECOND))
    for dtype in ("float32", "float16", "bfloat16")
    for backend in BACKENDS
    if (dtype, backend) != ("float32", "cuda")
]


@pytest.mark.parametrize(("dtype", "backend"), OF_DTYPE)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, backend: str, dtype: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], dtype=getattr(torch, dtype), device=device), backend)


# `long`: the others, and three more schedules of the emulator.
ON_GLUON = (
    "one query", "grouped heads", "head_dim 128", "narrower v", "causal, fewer keys",
    "top-left, more keys", "window", "window past the keys", "negative scale", "softcap",
    "alibi by batch", "sink, blind rows", "mask", "packed", "lengths", "dropout",
    "any order",
)  # fmt: skip


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.long] * (x not in ON_GLUON)) for x in CASES]
)
def test_gluon_against_float64(
    name: str, backend: str, device: str, gluon_seed: Callable[[int], None]
) -> None:
    """The gradients are those of the kernels that follow its forward."""
    check(dataclasses.replace(CASES[name], dtype=torch.float16, device=device), backend)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("name", CASES)
def test_gluon_schedules(
    name: str, backend: str, seed: int, device: str, gluon_seed: Callable[[int], None]
) -> None:
    gluon_seed(seed)
    case = dataclasses.replace(CASES[name], dtype=torch.bfloat16, device=device, seed=seed)
    if refusal(case, backend) is None:  # else test_gluon_against_float64 has said so
        check_forward(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("everything that ATen has", "everything, packed"))
def test_in_float64(name: str, backend: str, device: str) -> None:
    """The definition is as exact as its inputs; the kernels compute in float32 and say so."""
    check(dataclasses.replace(CASES[name], dtype=torch.float64, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    (
        "packed, dropout",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("dropout", "dropout, causal")),
    ),
)
def test_dropout_of_other_seeds(name: str, backend: str, device: str) -> None:
    """The table's seeds are no lucky ones."""
    for seed in (1, 2):
        case = dataclasses.replace(CASES[name], device=device, seed=seed)
        check(runnable(case, backend), backend)


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
        q = torch.randn(1, seqlen, 1, 16, requires_grad=True)
        kept = laws.kept(lambda: fastattn.attention(q, q, q, causal=True))
        return sum(x.numel() * x.element_size() for x in kept)

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
    described = describe(q, q, q, causal=True)
    out, lse = kernels.forward(q, q, q, Extras(), described.settings)
    kernels.backward(out, lse, out, lse, NO_GRADIENT, q, q, q, Extras(), described.settings)
    sizes = [x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)]
    assert max(sizes) == q.numel() * 2


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.causal or case.window])
def test_chunks_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend takes long sequences in chunks; here short ones."""
    monkeypatch.setattr(aten, "CHUNK", 16)
    check(CASES[name], "torch")
