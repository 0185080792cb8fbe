"""The `cuda` backend of attention on a key-value cache; without a GPU in the emulator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.attention.cache import test_cache as table

import fastattn
from fastattn import attention_with_kv_cache
from fastattn.ops.attention import tiles
from fastattn.ops.attention.cache.cuda import split
from fastattn.ops.common import launch
from oracle import assert_close_to_reference

DTYPES = (torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("emulator")


def run(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_with_kv_cache(**call, return_lse=True, backend="cuda")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float16", "bfloat16"))
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "group"),
    [(128, 128, 8), (256, 256, 1), (100, 128, 2), (192, 130, 2), (5, 3, 1), (72, 8, 17)],
)
def test_widths(
    head_dim: int, head_dim_v: int, group: int, dtype: torch.dtype, device: str
) -> None:
    """Rows that fill a tile of the kernel and that do not, whole 16 bytes and not."""
    call = {
        "q": normal(2, 2, 2 * group, head_dim, dtype=dtype),
        "k_cache": normal(2, 400, 2, head_dim, seed=1, dtype=dtype),
        "v_cache": normal(2, 400, 2, head_dim_v, seed=2, dtype=dtype),
        "cache_lengths": torch.tensor([333, 17]),
    }
    table.check(table.moved(call, device), "cuda")


@pytest.mark.parametrize("window", (None, (300, 0)), ids=("all", "window"))
def test_many_parts(window: tuple[int, int] | None, device: str) -> None:
    """More than the merge has under way at once; with the window most of them see no key."""
    call = table.plain_call((1, 1, 2, 136), 4500, [4400], torch.float16, device, kv_heads=1)
    table.check(call | {"window": window, "num_splits": 35}, "cuda")


@pytest.mark.parametrize("paged", (False, True), ids=("padded", "paged"))
@pytest.mark.parametrize("queries", (16, 40))
def test_many_queries(queries: int, paged: bool, device: str) -> None:
    """Several tiles of rows; 160 rows of a padded cache go to the forward kernel."""
    shape = (26, 10) if paged else (2, 130)
    call = {
        "q": normal(2, queries, 8, 64),
        "k_cache": normal(*shape, 2, 64, seed=1),
        "v_cache": normal(*shape, 2, 64, seed=2),
        "cache_lengths": torch.tensor([90, 4]),
        "k": normal(2, queries, 2, 64, seed=3),
        "v": normal(2, queries, 2, 64, seed=4),
        "sink": normal(8, seed=5),
        "window": (70, 0),
    }
    if paged:
        call["block_table"] = torch.arange(26).view(2, 13)
    table.check(table.moved(call, device), "cuda")


@pytest.mark.parametrize("offset", (1, 4, 8))
def test_memory_that_is_not_aligned(offset: int, device: str) -> None:
    """Rows at any multiple of 2 bytes, between others that are no concern of the call."""
    call: dict[str, Any] = {"cache_lengths": torch.tensor([70, 3], device=device)}
    shapes = {"q": (2, 1, 4), "k_cache": (2, 90, 2), "v_cache": (2, 90, 2), "k": (2, 2, 2)}
    for seed, (name, shape) in enumerate((shapes | {"v": (2, 2, 2)}).items()):
        call[name] = normal(*shape, 64 + offset, seed=seed).to(device)[..., offset:]
    exact, eager = (table.formula(call, kind) for kind in (torch.float64, torch.float16))
    before = call["k_cache"].clone(), call["v_cache"].clone()
    out, _ = run(call)
    assert_close_to_reference(out, eager[0], exact[0], name="out")
    for name, old in zip(("k", "v"), before):
        expected = old.clone()
        for b, n in enumerate((70, 3)):
            expected[b, n : n + 2] = call[name][b]
        assert torch.equal(call[f"{name}_cache"], expected)


@pytest.mark.parametrize("kind", (torch.float16, torch.bfloat16, torch.float64))
def test_rotary_tables_of_any_dtype(kind: torch.dtype, device: str) -> None:
    call = table.plain_call((2, 1, 4, 32), 40, [33, 0], torch.float16, "cpu", new=1)
    cos, sin = (normal(50, 16, seed=seed) for seed in (5, 6))
    for dtype in (torch.float32, kind):
        tables = {"rotary_cos": cos.to(kind), "rotary_sin": sin.to(dtype)}
        table.check(table.moved(call | tables, device), "cuda")


def test_pages_do_not_change_the_bits(device: str) -> None:
    call = table.plain_call((2, 2, 4, 64), 330, [330, 171], torch.float16, device)
    expected = run(call)
    order = torch.randperm(2 * 33, generator=torch.Generator().manual_seed(0))
    for name in ("k_cache", "v_cache"):
        pages = torch.empty(66, 10, 2, 64, device=device).half()
        pages[order] = call[name].reshape(66, 10, 2, 64)
        call[name] = pages
    for dtype in (torch.int32, torch.int64):
        table_of = {"block_table": order.view(2, 33).to(dtype).to(device)}
        assert all(map(torch.equal, run(call | table_of), expected))


def test_the_capacity_costs_nothing(device: str, emulator: Emulator) -> None:
    def counted(call: dict[str, Any]) -> tuple[Any, ...]:
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        counts = emulator.counts(lambda: results.append(run(call)))
        capacity = call["block_table"].shape[1] * 16
        cut = split(capacity, 4, 2, 2, launch.multiprocessors(call["q"].device), None)
        assert cut.most <= tiles.MOST_PARTS // 2
        blocks = tiles.PROGRAMS * launch.multiprocessors(call["q"].device)
        if counts is not None:
            assert counts["decode"]["blocks"] <= blocks
        return *results[0], cut

    table.check_capacity(counted, device)


def test_infinities_and_nan(device: str) -> None:
    """Inside a sequence they follow IEEE, and reach no other head or sequence."""
    call = table.plain_call((3, 1, 4, 16), 50, [50, 40, 30], torch.float16, device)
    clean = run(call)
    call["k_cache"][0, 20, 0, 3] = math.nan
    call["v_cache"][1, 35, 1, 5] = math.inf
    out, lse = (x.cpu() for x in run(call))
    assert out[0, 0, :2].isnan().all() and lse[0, :2].isnan().all()
    assert (out[1, 0, 2:, 5] == math.inf).all()
    touched = torch.zeros(out.shape, dtype=torch.bool)
    touched[0, 0, :2] = touched[1, 0, 2:, 5] = True
    assert torch.equal(out[~touched], clean[0].cpu()[~touched])


@pytest.mark.parametrize("softcap", (1e-300, 1e-50, 1e-42, 1e30, 1e39, 1e300))
def test_softcaps_that_float32_does_not_hold(softcap: float, device: str) -> None:
    q, k, v = (normal(1, n, 2, 16, seed=n).to(device) for n in (2, 30, 31))
    lengths = torch.tensor([30], device=device)
    out, exact = (
        attention_with_kv_cache(*x, lengths, softcap=softcap, backend=backend)
        for x, backend in (
            ((q, k, v[:, :30]), "cuda"),
            ((q.double(), k.double(), v[:, :30].double()), "reference"),
        )
    )
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)


def test_what_is_not_supported(device: str) -> None:
    call = table.moved(table.arguments(), device)
    wide = {
        name: torch.randn(2, 8, 2, 264, device=device).half() for name in ("k_cache", "v_cache")
    }
    wide["q"] = torch.randn(2, 1, 2, 264, device=device).half()
    for changes, message in (
        ({}, "compute in float16 and bfloat16, not in torch.float32"),
        (wide, "head_dim 264 is above 256"),
    ):
        with pytest.raises(fastattn.UnsupportedError, match=message):
            run(call | {"cache_lengths": torch.tensor([3, 8], device=device)} | changes)


@pytest.mark.parametrize(
    ("capacity", "rows", "wanted", "expected"),
    [
        (0, 1, None, (1, 256)),
        (256, 16, None, (1, 256)),
        (257, 16, None, (2, 256)),
        (257, 17, None, (1, 512)),
        (8192, 64, None, (8, 1024)),
        (8192, 65, None, (1, 128)),  # a prefill has blocks enough
        (10**6, 4, None, (512, 256)),
        (10**6, 40, None, (170, 768)),
        (1000, 4, 3, (3, 128)),
        (8192, 4, 0, (32, 256)),
    ],
)
def test_split(capacity: int, rows: int, wanted: int | None, expected: tuple[int, int]) -> None:
    """Not by the batch, unless the caller wants the GPU filled."""
    for batch in (1, 1000) if wanted != 0 else (1,):
        assert split(capacity, batch, 1, rows, 100, wanted)[:2] == expected
