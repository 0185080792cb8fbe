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


def check(call: dict[str, Any]) -> None:
    """The numeric rule, with NaN in every unused slot of the cache."""
    dtype = call["q"].dtype
    cpu = table.moved(call, "cpu")
    exact, eager = (table.formula(cpu, kind) for kind in (torch.float64, dtype))
    eager_lse = table.formula(cpu, torch.float32)[1]  # the LSE is float32 for every dtype
    mine = table.poisoned(call)
    out, lse = run(mine)
    assert out.dtype == dtype and lse.dtype == torch.float32
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if call.get("softcap") else {}
    assert_close_to_reference(out, eager[0], exact[0], name="out", **factors)
    # Its logarithms and exponentials are the GPU's approximations, off by a few units themselves.
    assert_close_to_reference(lse, eager_lse, exact[1], name="lse", ulps=16, **factors)
    if dtype == torch.float16 or call.get("rotary_cos") is None:  # it knows the rounding of float16
        table._check_appended(call, mine)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float16", "bfloat16"))
@pytest.mark.parametrize("seed", range(24))
def test_against_float64(seed: int, dtype: torch.dtype, device: str, emulator: Emulator) -> None:
    """The table of all backends: pages, GQA, rotary, windows, ALiBi, sinks, ..."""
    emulator.seed(seed)
    check(table.draw(seed, dtype, device))


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
    check(table.moved(call, device))


@pytest.mark.parametrize("window", (None, (300, 0)), ids=("all", "window"))
def test_many_parts(window: tuple[int, int] | None, device: str) -> None:
    """More than the merge has under way at once; with the window most of them see no key."""
    call = {
        "q": normal(1, 1, 2, 136),
        "k_cache": normal(1, 4500, 1, 136, seed=1),
        "v_cache": normal(1, 4500, 1, 136, seed=2),
        "cache_lengths": torch.tensor([4400]),
        "window": window,
        "num_splits": 35,
    }
    check(table.moved(call, device))


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
    check(table.moved(call, device))


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
    call = {
        "q": normal(2, 1, 4, 32),
        "k_cache": normal(2, 40, 2, 32, seed=1),
        "v_cache": normal(2, 40, 2, 32, seed=2),
        "k": normal(2, 1, 2, 32, seed=3),
        "v": normal(2, 1, 2, 32, seed=4),
        "cache_lengths": torch.tensor([33, 0]),
        "rotary_cos": normal(50, 16, seed=5).to(kind),
        "rotary_sin": normal(50, 16, seed=6).to(torch.float32),
        "rotary_interleaved": False,
    }
    check(table.moved(call, device))
    call["rotary_sin"] = call["rotary_sin"].to(kind)
    check(table.moved(call, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=("float16", "bfloat16"))
@pytest.mark.parametrize("num_splits", (None, 1, 5))
def test_alone_and_in_a_batch(
    num_splits: int | None, dtype: torch.dtype, device: str, emulator: Emulator
) -> None:
    """The same bits, whatever else is in the batch and in whatever order threads run."""
    q = normal(5, 1, 4, 32, dtype=dtype).to(device)
    k = normal(5, 700, 2, 32, seed=1, dtype=dtype).to(device)
    v = normal(5, 700, 2, 32, seed=2, dtype=dtype).to(device)
    lengths = torch.tensor([700, 3, 0, 257, 512], device=device)

    def rows(b: slice, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        emulator.seed(seed)
        return attention_with_kv_cache(
            q[b], k[b], v[b], lengths[b], num_splits=num_splits, return_lse=True, backend="cuda"
        )

    out, lse = rows(slice(0, 5), 1)
    for b in range(5):
        one = slice(b, b + 1)
        alone = rows(one, 2 + b)
        assert torch.equal(alone[0], out[one]) and torch.equal(alone[1], lse[one])


def test_pages_do_not_change_the_bits(device: str) -> None:
    q, k, v = (
        normal(2, 2, 4, 64),
        normal(2, 330, 2, 64, seed=1),
        normal(2, 330, 2, 64, seed=2),
    )
    lengths = torch.tensor([330, 171])
    call = table.moved({"q": q, "k_cache": k, "v_cache": v, "cache_lengths": lengths}, device)
    expected = run(call)
    order = torch.randperm(2 * 33, generator=torch.Generator().manual_seed(0))
    pages = [torch.empty(66, 10, 2, 64).half() for _ in range(2)]
    for x, paged in zip((k, v), pages):
        paged[order] = x.reshape(66, 10, 2, 64)
    for dtype in (torch.int32, torch.int64):
        paged_call = call | {
            "k_cache": pages[0],
            "v_cache": pages[1],
            "block_table": order.view(2, 33).to(dtype),
        }
        assert all(map(torch.equal, run(table.moved(paged_call, device)), expected))


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


def test_long_sequences_have_longer_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table.check_longer_parts("cuda", device, monkeypatch)


def test_many_sequences(device: str) -> None:
    table.check_many_sequences("cuda", device)


def test_splits_do_not_change_the_result(device: str) -> None:
    q, k, v = (
        normal(2, 2, 4, 32),
        normal(2, 900, 1, 32, seed=1),
        normal(2, 900, 1, 32, seed=2),
    )
    lengths = torch.tensor([900, 450])
    call = table.moved({"q": q, "k_cache": k, "v_cache": v, "cache_lengths": lengths}, device)
    whole = run(call | {"num_splits": 1})
    for num_splits in (None, 0, 2, 7, 100):
        out, lse = run(call | {"num_splits": num_splits})
        torch.testing.assert_close(out, whole[0], rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)


def test_infinities_and_nan(device: str) -> None:
    """Inside a sequence they follow IEEE, and reach no other head or sequence."""
    call = {
        "q": normal(3, 1, 4, 16),
        "k_cache": normal(3, 50, 2, 16, seed=1),
        "v_cache": normal(3, 50, 2, 16, seed=2),
        "cache_lengths": torch.tensor([50, 40, 30]),
    }
    clean = run(table.moved(call, device))
    call["k_cache"][0, 20, 0, 3] = math.nan
    call["v_cache"][1, 35, 1, 5] = math.inf
    out, lse = (x.cpu() for x in run(table.moved(call, device)))
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


@pytest.mark.parametrize("name", table.CONTENTS)
def test_unchecked_contents_touch_nothing_outside(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator raises for an access outside of the tensors."""
    table.check_no_values(monkeypatch)
    call = table.moved(table.arguments(**table.CONTENTS[name]), device)
    for key in ("q", "k_cache", "v_cache", "k", "v"):
        if key in call:
            call[key] = call[key].half()
    before = call["k_cache"].clone()
    out, lse = run(call)
    assert out.shape == call["q"].shape and out.isfinite().all() and not lse.isnan().any()
    if call.get("block_table") is None:  # else the nearest page stands for one that is not there
        assert torch.equal(call["k_cache"], before)


@pytest.mark.parametrize("found_by", ("block_table", "cache_indices"))
def test_an_empty_pool(found_by: str, device: str) -> None:
    places = {"block_table": torch.zeros(2, 3).int(), "cache_indices": torch.zeros(0).int()}
    batch = 2 if found_by == "block_table" else 0
    call = {
        "q": normal(batch, 1, 4, 16),
        "k_cache": normal(0, 4, 2, 16),
        "v_cache": normal(0, 4, 2, 16),
        "cache_lengths": torch.zeros(batch).int(),
        found_by: places[found_by],
    }
    out, lse = run(table.moved(call, device))
    assert out.shape == (batch, 1, 4, 16) and (out == 0).all() and (lse == -math.inf).all()


def test_compiles(device: str) -> None:
    """One graph for every length, with the caches written in place."""

    def step(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, n: torch.Tensor
    ) -> torch.Tensor:
        new = q[:, :, :2]
        return attention_with_kv_cache(q, k_cache, v_cache, n, k=new, v=new, backend="cuda")

    q = normal(2, 1, 4, 16).to(device)
    caches = [normal(2, 10, 2, 16, seed=1).to(device) for _ in range(4)]
    lengths = torch.tensor([3, 8], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, *caches[:2], lengths), step(q, *caches[2:], lengths))
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


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
