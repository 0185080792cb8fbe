"""Attention on a key-value cache, on every backend against float64."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.attention import cases
from ops.backends import widest

import fastattn
from fastattn import attention_with_kv_cache
from fastattn.backends import triton_runs
from fastattn.ops.attention import tiles
from fastattn.ops.attention.cache import interface, problem, reference
from fastattn.ops.common import launch
from oracle import assert_close_to_reference

BACKENDS = ("reference", "torch", "triton")


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x (seqlen, heads, head_dim) by cos and sin (seqlen, rotary_dim / 2), as complex numbers."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).mT
    angle = torch.complex(cos, sin)[:, None]
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    turned = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat([turned, rest], -1)


def formula(call: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, a sequence at a time, in `dtype`."""
    q, k_cache, v_cache = (call[name].to(dtype) for name in ("q", "k_cache", "v_cache"))
    names = ("window", "softmax_scale", "sink")
    slopes = call.get("alibi_slopes")
    options = {"causal": call.get("causal", True), "softcap": call.get("softcap") or 0.0}
    options |= {name: call.get(name) for name in names}
    banded = options["causal"] or (options["window"] or (-1, -1)) != (-1, -1)
    outs, lses = [], []
    for b, n in enumerate(call["cache_lengths"].tolist()):
        rows, slots = zip(*(place_of(call, b, j) for j in range(n))) if n else ((), ())
        queries, keys, values = (
            q[b],
            k_cache[list(rows), list(slots)],
            v_cache[list(rows), list(slots)],
        )
        if call.get("k") is not None:
            new = rotated(call, call["k"][b], n + torch.arange(call["k"].shape[1]))
            keys = torch.cat([keys, new.to(dtype)])
            values = torch.cat([values, call["v"][b].to(dtype)])
            place = n + torch.arange(len(queries)) * int(banded)
            queries = rotated(call, call["q"][b], place).to(dtype)
        start = 0 if call.get("cache_starts") is None else int(call["cache_starts"][b])
        mask = (torch.arange(len(keys)) >= start).view(1, 1, 1, -1)
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        options |= {"mask": mask, "alibi_slopes": own}
        out, lse = cases.formula(queries[None], keys[None], values[None], **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def place_of(call: dict[str, Any], b: int, j: int) -> tuple[int, int]:
    """Where key j of sequence b lies in the cache: page or row, and slot."""
    if call.get("block_table") is not None:
        size = call["k_cache"].shape[1]
        return int(call["block_table"][b, j // size]), j % size
    return b if call.get("cache_indices") is None else int(call["cache_indices"][b]), j


def rotated(call: dict[str, Any], x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """x (seqlen, heads, head_dim) turned by the call's tables, in float64, then in x's dtype."""
    if call.get("rotary_cos") is None:
        return x
    cos, sin = (call[name][place].double() for name in ("rotary_cos", "rotary_sin"))
    return rotate(x.double(), cos, sin, call.get("rotary_interleaved", False)).to(x.dtype)


def draw(seed: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A call with features drawn from the seed; unused slots hold NaN."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(kind)

    def maybe(chance: float = 0.4) -> bool:
        return rng.random() < chance

    batch, kv_heads, group = rng.choice((1, 3)), rng.choice((1, 2)), rng.choice((1, 3, 4))
    head_dim = rng.choice((16, 40, 64))
    head_dim_v = rng.choice((head_dim, 24))
    seqlen_q, capacity = rng.choice((1, 1, 2, 7, 33)), rng.choice((1, 60, 130, 600))
    new = rng.choice((0, 1, seqlen_q)) if capacity > 33 else 0
    call: dict[str, Any] = {"q": normal(batch, seqlen_q, kv_heads * group, head_dim)}
    page = rng.choice((None, None, 1, 7, 16, 50))
    rows = batch
    if page is not None:
        each = -(-capacity // page)
        capacity = each * page
        rows = each * batch + 2
        table = torch.randperm(rows, generator=g)[: each * batch].view(batch, each)
        call["block_table"] = table.to(rng.choice((torch.int32, torch.int64)))
    elif maybe():
        rows = batch + 2
        call["cache_indices"] = torch.randperm(rows, generator=g)[:batch]
    slots = capacity if page is None else page
    call["k_cache"] = normal(rows, slots, kv_heads, head_dim)
    call["v_cache"] = normal(rows, slots, kv_heads, head_dim_v)
    lengths = torch.randint(0, capacity - new + 1, (batch,), generator=g)
    call["cache_lengths"] = lengths
    if new:
        call["k"], call["v"] = (
            normal(batch, new, kv_heads, head_dim),
            normal(batch, new, kv_heads, head_dim_v),
        )
        if maybe(0.6):
            angles = torch.rand(capacity + 40, rng.choice((4, 8)), generator=g) * 6
            call["rotary_cos"], call["rotary_sin"] = angles.cos(), angles.sin()
            call["rotary_interleaved"] = maybe()
    if maybe():
        call["cache_starts"] = torch.randint(0, 50, (batch,), generator=g)
    call["causal"] = maybe(0.6)
    if maybe(0.3):
        call["window"] = rng.choice(((20, 5), (0, -1), (-1, 3)))
    if maybe(0.3):
        call["softcap"] = 3.0
    if maybe(0.3):
        call["alibi_slopes"] = torch.rand(kv_heads * group, generator=g)
    if maybe(0.3):
        call["sink"] = normal(kv_heads * group, kind=torch.float32)
    call["num_splits"] = rng.choice((None, None, 0, 3))
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def poisoned(call: dict[str, Any]) -> dict[str, Any]:
    """The call with NaN in every slot of the cache that no sequence uses yet."""
    call = dict(call)
    used = torch.zeros(call["k_cache"].shape[:2], dtype=torch.bool)
    starts = call.get("cache_starts")
    for b, n in enumerate(call["cache_lengths"].tolist()):
        for j in range(0 if starts is None else min(int(starts[b]), n), n):
            used[place_of(call, b, j)] = True
    hidden = ~used[:, :, None, None].to(call["k_cache"].device)
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].masked_fill(hidden, math.nan)
    return call


def check(call: dict[str, Any], backend: str) -> None:
    """The numeric rule, with NaN in every unused slot, and what is in the caches afterwards."""
    dtype = call["q"].dtype
    cpu = moved(call, "cpu")
    exact, eager = (formula(cpu, kind) for kind in (torch.float64, dtype))
    eager_lse = formula(cpu, torch.float32)[1]  # the LSE is float32 for every dtype
    mine = poisoned(call)
    try:
        out, lse = attention_with_kv_cache(**mine, return_lse=True, backend=backend)
    except fastattn.UnsupportedError as error:
        words = ("softcap", "sink", "head_dim of q", "cache", "only on the CPU")
        assert backend == "torch" and any(w in str(error) for w in words), error
        return
    assert out.dtype == dtype and lse.dtype == torch.float32
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if call.get("softcap") else {}
    # The LSE of 16-bit inputs is made by a GPU's approximations, off by a few units themselves. ATen
    # computes exponentials on the CPU to 20 bits, and sums float16 ones.
    half = dtype != torch.float32
    ulps = (4, 16 if half else 4)
    if backend == "torch":
        ulps = (16, 512 if half else 32)
    assert_close_to_reference(out, eager[0], exact[0], name="out", ulps=ulps[0], **factors)
    assert_close_to_reference(lse, eager_lse, exact[1], name="lse", ulps=ulps[1], **factors)
    check_appended(call, mine)


DRAWN = [
    (seed, (torch.float32, torch.float16)[seed % 2], b) for seed in range(40) for b in BACKENDS
]
DRAWN += [(seed, x, "cuda") for seed in range(24) for x in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("seed", "dtype", "backend"), DRAWN)
def test_against_float64(seed: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Pages, shared heads, rotary, windows, ALiBi, sinks, parts, ..."""
    check(draw(seed, dtype, device), backend)


def check_appended(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The new keys and values are where they belong, and nothing else has changed."""
    if before.get("k") is None:
        return
    untouched = torch.ones(before["k_cache"].shape[:2], dtype=torch.bool)
    cpu = moved(before, "cpu")
    for b, n in enumerate(before["cache_lengths"].tolist()):
        for t in range(before["k"].shape[1]):
            place = place_of(before, b, n + t)
            untouched[place] = False
            assert torch.equal(after["v_cache"][place], before["v"][b, t])
            expected = rotated(cpu, cpu["k"][b, t : t + 1], torch.tensor([n + t]))[0]
            tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(
                after["k_cache"][place].cpu(), expected, rtol=tolerance, atol=1e-3
            )
    poison = poisoned(before)
    for name in ("k_cache", "v_cache"):
        same = (after[name] == poison[name]) | (after[name].isnan() & poison[name].isnan())
        assert same.flatten(2).all(-1).cpu()[untouched].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", ({}, {"window": (20, 0)}, {"causal": False}, {"starts": True}))
@pytest.mark.parametrize("seqlen_q", (1, 3))
@pytest.mark.parametrize("lengths", ([40] * 4, [40, 40, 9, 9], [0, 0, 30, 0]))
def test_sequences_of_one_length(
    lengths: list[int], seqlen_q: int, features: dict[str, Any], backend: str, device: str
) -> None:
    """The torch backend takes neighbours of one length together; with one query, a group too."""
    shape = 4, seqlen_q, 6, 16
    call = plain_call(shape, 50, lengths, torch.float32, "cpu", new=seqlen_q) | features
    if call.pop("starts", False):
        call["cache_starts"] = torch.tensor([2, 2, 0, 0])
    check(moved(call, device), backend)
    without = attention_with_kv_cache(**poisoned(moved(call, device)), backend=backend)
    exact, eager = formula(call, torch.float64)[0], formula(call, torch.float32)[0]
    ulps = 32 if backend == "torch" else 4
    assert_close_to_reference(without, eager, exact, name="without the LSE", ulps=ulps)


@pytest.fixture
def reschedule(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Gives the emulator, if the test's backend runs in it, another schedule."""
    emulator = None
    if request.node.callspec.params["backend"] == "cuda":
        emulator = request.getfixturevalue("emulator")
    seeds = itertools.count(1)
    return lambda: None if emulator is None else emulator.seed(next(seeds))


def alone_and_together(call: dict[str, Any], backend: str, reschedule: Callable[[], None]) -> None:
    """The same bits of each sequence in a batch of one, in whatever order threads run."""
    options: dict[str, Any] = {"return_lse": True, "backend": backend}
    reschedule()
    out, lse = attention_with_kv_cache(**call, **options)
    for b in range(len(out)):
        one = {n: x[b : b + 1] if isinstance(x, torch.Tensor) else x for n, x in call.items()}
        reschedule()
        alone = attention_with_kv_cache(**one, **options)
        assert torch.equal(alone[0][0], out[b]) and torch.equal(alone[1][0], lse[b])


OF_KERNELS = pytest.mark.parametrize("backend", ("triton", "cuda"))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, "triton"), (torch.float16, "cuda"), (torch.bfloat16, "cuda")],
)
@pytest.mark.parametrize("num_splits", (None, 1, 5))
def test_alone_and_in_a_batch(
    num_splits: int | None, dtype: torch.dtype, backend: str, device: str,
    reschedule: Callable[[], None],
) -> None:  # fmt: skip
    """The same bits, whatever else is in the batch; unless the splits are chosen for the batch."""
    call = plain_call((5, 1, 4, 32), 700, [700, 3, 0, 257, 512], dtype, device)
    alone_and_together(call | {"num_splits": num_splits}, backend, reschedule)


def plain_call(
    shape: tuple[int, ...], capacity: int, lengths: list[int], dtype: torch.dtype, device: str,
    kv_heads: int = 2, new: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A call without features, q of this shape; with `new` keys a sequence, if any."""
    g = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {"q": torch.randn(shape, generator=g).to(dtype)}
    for names, length in ((("k_cache", "v_cache"), capacity), (("k", "v"), new)):
        if length:
            both = torch.randn(2, shape[0], length, kv_heads, shape[3], generator=g).to(dtype)
            call |= zip(names, both)
    return moved(call | {"cache_lengths": torch.tensor(lengths)}, device)


def long_table(columns: int, device: str) -> dict[str, Any]:
    """A call with the same keys for any `columns`: of a table of pages of 16."""
    g = torch.Generator().manual_seed(0)
    pages = torch.randperm(40, generator=g)
    call = {
        "q": torch.randn(4, 1, 4, 16, generator=g).half(),
        "k_cache": torch.randn(40, 16, 2, 16, generator=g).half(),
        "v_cache": torch.randn(40, 16, 2, 16, generator=g).half(),
        "cache_lengths": torch.tensor([500, 3, 0, 257]),
        "block_table": pages.repeat(-(-columns // 40))[:columns].expand(4, columns),
    }
    return moved(call, device)


def check_capacity(run: Callable[[dict[str, Any]], Any], device: str) -> None:
    """Any capacity gives the same bits; `run` returns out, LSE, and the launch's numbers."""
    few, many, more = (run(long_table(columns, device)) for columns in (40, 5000, 80000))
    for result in (many, more):
        assert all(map(torch.equal, result[:2], few[:2]))
    assert many[2:] == more[2:]


def test_the_capacity_costs_nothing(device: str) -> None:
    """Neither programs nor memory for results grow with what the table has room for."""

    def run(call: dict[str, Any]) -> tuple[Any, ...]:
        with launch.recorded() as launches:
            out, lse = attention_with_kv_cache(**call, return_lse=True, backend="triton")
        decode, merge = launches
        assert merge.kernel.__name__ == "_merge_kernel"
        part_out, part_lse = merge.args[:2]
        programs = tiles.PROGRAMS * launch.multiprocessors(call["q"].device)
        assert math.prod(decode.grid) <= programs
        assert part_out.shape[0] <= tiles.MOST_PARTS // 2
        return out, lse, decode.grid, part_out.shape, part_lse.shape

    check_capacity(run, device)


@OF_KERNELS
def test_long_sequences_have_longer_parts(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, reschedule: Callable[[], None]
) -> None:
    """No more of them, and the same bits alone and in a batch."""
    monkeypatch.setattr(tiles, "MOST_PARTS", 6)  # 3 for each of two key heads
    call = plain_call((3, 2, 4, 16), 1200, [1200, 769, 256], torch.float16, device)
    check(call, backend)
    alone_and_together(call, backend, reschedule)


@OF_KERNELS
def test_many_sequences(backend: str, device: str) -> None:
    """More than a program looks at at once, of no, one and two parts."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 20, (140,), generator=g)
    lengths[::25] = torch.tensor([300, 0, 256, 257, 511, 512])
    call = {
        "q": torch.randn(140, 1, 1, 16, generator=g).half(),
        "k_cache": torch.randn(40, 16, 1, 16, generator=g).half(),
        "v_cache": torch.randn(40, 16, 1, 16, generator=g).half(),
        "cache_lengths": lengths,
        "block_table": torch.randint(0, 40, (140, 32), generator=g),
    }
    check(moved(call, device), backend)


@OF_KERNELS
def test_splits_do_not_change_the_result(backend: str, device: str) -> None:
    call = plain_call((2, 2, 4, 32), 900, [900, 450], widest(backend), device, kv_heads=1)
    options: dict[str, Any] = {"return_lse": True, "backend": backend}
    rtol, atol = (1e-5, 1e-6) if backend == "triton" else (2e-3, 2e-4)
    whole = attention_with_kv_cache(**call, num_splits=1, **options)
    for num_splits in (None, 0, 2, 7, 100):
        out, lse = attention_with_kv_cache(**call, num_splits=num_splits, **options)
        torch.testing.assert_close(out, whole[0], rtol=rtol, atol=atol)
        torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)


def test_decoding_equals_prefill(device: str) -> None:
    """Token by token with an empty cache at first, against causal attention on all of them."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 16, generator=g).to(device)
    k, v = torch.randn(2, 2, 9, 2, 16, generator=g).to(device)
    k_cache, v_cache = torch.full((2, 2, 12, 2, 16), math.nan, device=device)
    steps = []
    for t in range(9):
        now = slice(t, t + 1)
        lengths = torch.full((2,), t, device=device)
        steps.append(
            attention_with_kv_cache(q[:, now], k_cache, v_cache, lengths, k=k[:, now], v=v[:, now])
        )
    torch.testing.assert_close(
        torch.cat(steps, 1), fastattn.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-5
    )


def arguments(**changes: Any) -> dict[str, Any]:
    call = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.randn(2, 10, 2, 16),
        "v_cache": torch.randn(2, 10, 2, 16),
        "cache_lengths": torch.tensor([3, 9]),
    }
    return call | changes


NEW = torch.randn(2, 1, 2, 16)
PAGES = {"k_cache": torch.randn(6, 4, 2, 16), "v_cache": torch.randn(6, 4, 2, 16)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(2, 4, 16)}, ValueError, r"q must have 4 dimensions"),
        ({"k_cache": torch.randn(2, 10, 2, 8)}, ValueError, "k_cache must have q's head_dim 16"),
        ({"v_cache": torch.randn(2, 9, 2, 16)}, ValueError, "v_cache must have k_cache's shape"),
        ({"k_cache": torch.randn(2, 10, 2, 16).half()}, TypeError, "q, k_cache and v_cache must have one dtype"),
        ({"k_cache": torch.randn(3, 10, 2, 16), "v_cache": torch.randn(3, 10, 2, 16)}, ValueError, "batch size 2 in dimension 0; got 3: give cache_indices"),
        ({"k_cache": torch.randn(2, 10, 16, 2).mT}, ValueError, "contiguous in its last dimension"),
        ({"cache_lengths": torch.tensor([1.0, 2.0])}, TypeError, "cache_lengths must be int32 or int64"),
        ({"cache_lengths": torch.tensor([1, 2, 3])}, ValueError, r"cache_lengths must have the shape \(batch,\) = \(2,\)"),
        ({"cache_lengths": torch.tensor([3, 11])}, ValueError, r"cache_lengths\[1\] must lie in \[0, 10\]"),
        ({"cache_lengths": torch.tensor([-1, 3])}, ValueError, r"cache_lengths\[0\] must lie in"),
        ({"cache_lengths": torch.tensor([3, 10]), "k": NEW, "v": NEW}, ValueError, r"must lie in \[0, 9\].* 1 are appended"),
        ({"k": NEW}, ValueError, "give both or neither"),
        ({"k": NEW, "v": torch.randn(2, 2, 2, 16)}, ValueError, "v must have the shape"),
        ({"k": NEW.double(), "v": NEW.double()}, TypeError, "k must have q's dtype"),
        ({"cache_indices": torch.tensor([0, 2])}, ValueError, r"cache_indices must lie in \[0, 2\).*got 2"),
        ({"cache_indices": torch.tensor([0, 1]), "block_table": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "give one"),
        (PAGES | {"block_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"\(batch, pages of a sequence\) = \(2, ...\)"),
        (PAGES | {"block_table": torch.zeros(2, 3)}, TypeError, "block_table must be int32 or int64"),
        (PAGES | {"block_table": torch.tensor([[0, 1, 2], [3, 4, 6]])}, ValueError, r"block_table\[1\] must hold pages in \[0, 6\).*got 6"),
        ({"rotary_cos": torch.ones(10, 4)}, ValueError, "give both or neither"),
        ({"rotary_cos": torch.ones(10, 4), "rotary_sin": torch.ones(10, 4)}, ValueError, "give k and v, or rotate q"),
        ({"rotary_cos": torch.ones(10, 9), "rotary_sin": torch.ones(10, 9), "k": NEW, "v": NEW}, ValueError, "rotary_dim at most head_dim 16"),
        ({"rotary_cos": torch.ones(4, 4), "rotary_sin": torch.ones(4, 4), "k": NEW, "v": NEW}, ValueError, "must reach position 9; they have 4"),
        ({"q": torch.randn(2, 4, 4, 16), "rotary_cos": torch.ones(12, 4), "rotary_sin": torch.ones(12, 4), "k": NEW, "v": NEW}, ValueError, "must reach position 12; they have 12"),  # of the last query
        ({"rotary_cos": torch.ones(10, 4, requires_grad=True), "rotary_sin": torch.ones(10, 4), "k": NEW, "v": NEW}, ValueError, "inference .* torch.no_grad"),
        ({"rotary_cos": torch.ones(10, 4), "rotary_sin": torch.ones(10, 4, requires_grad=True), "k": NEW, "v": NEW}, ValueError, "inference .* torch.no_grad"),
        ({"causal": "top_left"}, ValueError, "no top-left diagonal"),
        (PAGES | {"k_cache": torch.randn(0, 4, 2, 16), "v_cache": torch.randn(0, 4, 2, 16), "block_table": torch.zeros(2, 3).int()}, ValueError, r"cache_lengths\[0\] must lie in \[0, 0\].* 0 keys"),
        ({"window": (1, -2)}, ValueError, "window must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must have the shape \(heads,\) = \(4,\)"),
        ({"sink": torch.ones(2)}, ValueError, r"sink must have the shape \(heads,\) = \(4,\)"),
        ({"num_splits": -1}, ValueError, "num_splits must be None"),
        ({"q": torch.randn(2, 1, 4, 16, requires_grad=True)}, ValueError, "inference .* torch.no_grad"),
        ({"q": torch.randn(2, 1, 4, 16, device="meta")}, ValueError, "q, k_cache and v_cache must be on one device"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_with_kv_cache(**arguments(**changes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotary_tables_that_are_just_long_enough(backend: str, device: str) -> None:
    """The last of 4 queries stands at 12; without causality all stand at 9, as the new key does."""
    for causal, positions in ((True, 13), (False, 10)):
        angles = torch.rand(20, 4) * 6
        call = arguments(q=torch.randn(2, 4, 4, 16), k=NEW, v=NEW, causal=causal)
        outs = []
        for n in (20, positions):
            tables = {"rotary_cos": angles[:n].cos(), "rotary_sin": angles[:n].sin()}
            outs.append(attention_with_kv_cache(**moved(call | tables, device), backend=backend))
        assert torch.equal(*outs)


def steps(lengths: list[int], seqlen_q: int, kv_heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """Causal, appending, without other features; unused slots hold NaN; q, k, v are slices."""
    batch = len(lengths)
    caches = torch.randn(2, batch, 24, kv_heads, 16)
    for b, n in enumerate(lengths):
        caches[:, b, n:] = math.nan
    packed = torch.randn(batch, seqlen_q, 4 + 2 * kv_heads, 16).to(dtype)
    q, k, v = packed.split([4, kv_heads, kv_heads], dim=2)
    k_cache, v_cache = caches.to(dtype)
    return {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_lengths": torch.tensor(lengths),
        "k": k, "v": v,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (None, 0.3, -0.3, 0.0))
@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize(
    ("lengths", "seqlen_q"),
    (
        ([9], 1),
        ([9] * 3, 1),
        ([9, 9, 0, 23, 9], 1),
        ([0, 0], 7),
        ([0], 24),
        ([3, 3], 5),
        ([0, 4], 5),
    ),
)
def test_plain_steps(
    lengths: list[int], seqlen_q: int, kv_heads: int, scale: float | None, dtype: torch.dtype
) -> None:
    """What a CPU does without a description (`straight`) is what is described."""
    call = steps(lengths, seqlen_q, kv_heads, dtype) | {"softmax_scale": scale}
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with torch.no_grad():
        out = attention_with_kv_cache(**call)
    exact, _ = formula(before, torch.float64)
    eager, _ = formula(before, dtype)
    assert_close_to_reference(out, exact, eager)
    for b, n in enumerate(lengths):
        for name in ("k", "v"):
            row = call[f"{name}_cache"][b]
            assert torch.equal(row[n : n + seqlen_q], call[name][b])
            expected = before[f"{name}_cache"][b]
            expected[n : n + seqlen_q] = call[name][b]
            assert torch.equal(row.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_plain_steps_that_do_not_fit_write_nothing() -> None:
    for changes in ({"cache_lengths": torch.tensor([9, 24])}, {"v": torch.zeros(2, 1, 4, 8)}):
        call = steps([9, 3], 1, 4, torch.float32) | changes
        before = call["k_cache"].nan_to_num(7.0)
        with torch.no_grad(), pytest.raises(ValueError, match=r"cache_lengths|v must have"):
            attention_with_kv_cache(**call)
        assert torch.equal(call["k_cache"].nan_to_num(7.0), before)


def test_reference_compiles_whole() -> None:
    """Its shapes do not depend on data, so that it can be captured too."""
    torch._dynamo.reset()
    call = steps([9, 3], 2, 2, torch.float32)
    expected = {k: v.clone() for k, v in call.items()}

    def step(**call: torch.Tensor) -> torch.Tensor:
        return attention_with_kv_cache(**call, backend="reference")

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(**call)
        torch.testing.assert_close(compiled, step(**expected))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(call[name], expected[name], equal_nan=True)


# --- contents that nobody checks ------------------------------------------------------------------


def moved(call: dict[str, Any], device: str) -> dict[str, Any]:
    """Copies on the device."""
    return {k: v.clone().to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def check_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    for module in (interface, problem, reference):
        monkeypatch.setattr(module, "values_are_checked", lambda tensor: False)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; on a CPU an access outside of a launch's tensors raises."""
    from fastattn.ops.common import launch

    check_no_values(monkeypatch)
    if triton_runs() != "interpreted":  # where the IR is executed, every access is checked
        return
    from triton.runtime.interpreter import InterpreterBuilder

    extents: list[tuple[int, int]] = []
    original = launch.launch

    def launched(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.numel()]
        extents[:] = [
            (x.data_ptr(), x.data_ptr() + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))))
            for x in tensors
        ]  # fmt: skip
        original(kernel, grid, *args, **constants)

    def checked(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def method(self: Any, pointers: Any, *args: Any) -> Any:
            touched = pointers.data[args[mask_at].data]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            inside = touched != touched
            for start, end in extents:
                inside |= (touched >= start) & (touched + size <= end)
            assert inside.all(), f"{(~inside).sum()} of {touched.size} elements lie outside"
            return access(self, pointers, *args)

        return method

    monkeypatch.setattr(launch, "launch", launched)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        access = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, checked(access, mask_at))


APPENDED = {"k": NEW, "v": NEW}
TURNED = APPENDED | {"rotary_cos": torch.rand(3, 4), "rotary_sin": torch.rand(3, 4)}
LARGE = 2**31 - 1
CONTENTS: dict[str, dict[str, Any]] = {
    "no room and negative": APPENDED | {"cache_lengths": torch.tensor([10, -4])},
    "pages that are not there": PAGES | APPENDED | {"block_table": torch.tensor([[0, 99, 2], [-7, 1, 3]])},
    "pages of 64 bits": PAGES | APPENDED | {"block_table": torch.tensor([[2**40, -(2**40), 2**31]] * 2)},
    "rows that are not there": {"cache_indices": torch.tensor([7, -1])},
    # The largest length, plus one, is the smallest, and minus one the largest again.
    "lengths, rotary": TURNED | {"cache_lengths": torch.tensor([LARGE, -LARGE - 1], dtype=torch.int32), "q": torch.randn(2, 4, 4, 16)},
    "lengths, splits": {"cache_lengths": torch.tensor([LARGE, -LARGE - 1]), "num_splits": 3, "k_cache": torch.randn(2, 300, 2, 16), "v_cache": torch.randn(2, 300, 2, 16)},
    "lengths of 64 bits, rotary": TURNED | {"cache_lengths": torch.tensor([2**31 + 7, 2**40]), "q": torch.randn(2, 4, 4, 16)},
    "the largest lengths of 64 bits": APPENDED | {"cache_lengths": torch.tensor([2**63 - 1, -(2**63)])},
    "starts": {"cache_starts": torch.tensor([LARGE, -LARGE - 1]), "window": (3, 0), "q": torch.randn(2, 4, 4, 16)},
    "starts of 64 bits": {"cache_starts": torch.tensor([2**40, -(2**40)])},
    "no page": {"k_cache": torch.randn(0, 4, 2, 16), "v_cache": torch.randn(0, 4, 2, 16), "block_table": torch.zeros(2, 3).int()},
    "no page to append to": APPENDED | {"k_cache": torch.randn(0, 4, 2, 16), "v_cache": torch.randn(0, 4, 2, 16), "block_table": torch.zeros(2, 3).int()},
    "no row": {"k_cache": torch.randn(0, 10, 2, 16), "v_cache": torch.randn(0, 10, 2, 16), "cache_indices": torch.tensor([0, 0])},
}  # fmt: skip


def cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call with q and all keys and values in `dtype`."""
    names = {"q", "k_cache", "v_cache", "k", "v"} & call.keys()
    return call | {name: call[name].to(dtype) for name in names}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", ("triton", "reference", "cuda"))
@pytest.mark.parametrize("name", CONTENTS)
def test_unchecked_contents_touch_nothing_outside(name: str, backend: str, device: str) -> None:
    """What a GPU does with wrong contents, unchecked: no fault, nothing written out of place.

    The emulator raises for an access outside of the tensors.
    """
    call = cast(moved(arguments(**CONTENTS[name]), device), widest(backend))
    before = call["k_cache"].clone()
    out, lse = attention_with_kv_cache(**call, return_lse=True, backend=backend)
    assert out.shape == call["q"].shape and out.isfinite().all() and not lse.isnan().any()
    if call.get("block_table") is None:  # else the nearest page stands for one that is not there
        assert torch.equal(call["k_cache"], before)


@pytest.mark.usefixtures("unchecked")
def test_unchecked_lengths_are_cut_to_the_cache(device: str) -> None:
    """Beyond 2^31 as well: all of the keys are seen, or none."""
    for dtype, wrong in ((torch.int32, (LARGE, -LARGE - 1)), (torch.int64, (2**40, -(2**40)))):
        right = moved(arguments(cache_lengths=torch.tensor([10, 0])), device)
        call = right | {"cache_lengths": torch.tensor(wrong, dtype=dtype, device=device)}
        for backend in ("triton", "reference"):
            ours = attention_with_kv_cache(**call, return_lse=True, backend=backend)
            expected = attention_with_kv_cache(**right, return_lse=True, backend=backend)
            assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("backend", ("triton", "reference", "cuda", None))
@pytest.mark.parametrize("found_by", ("block_table", "cache_indices"))
def test_an_empty_pool(found_by: str, backend: str | None, device: str) -> None:
    """Before the first page is there, no sequence has a key."""
    places = {"block_table": torch.zeros(2, 3).int(), "cache_indices": torch.zeros(0).int()}
    batch = 2 if found_by == "block_table" else 0
    call = arguments(
        q=torch.randn(batch, 1, 4, 16),
        k_cache=torch.randn(0, 4, 2, 16),
        v_cache=torch.randn(0, 4, 2, 16),
        cache_lengths=torch.zeros(batch).int(),
        **{found_by: places[found_by]},
    )
    call = cast(moved(call, device), widest(backend))
    out, lse = attention_with_kv_cache(**call, return_lse=True, backend=backend)
    assert out.shape == (batch, 1, 4, 16) and (out == 0).all() and (lse == -math.inf).all()


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("cast", (False, True), ids=("one dtype", "q, k, v are float32"))
def test_autocast(cast: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """The cache's dtype counts: the same bits as outside with q, k and v in it, and its LSE."""
    refused = {torch.float64} | ({torch.bfloat16} if triton_runs() == "interpreted" else set())
    if backend == "triton" and dtype in refused:
        pytest.skip("no float64; Triton's interpreter multiplies no bfloat16")
    call = moved(arguments(k=NEW, v=NEW, cache_lengths=torch.tensor([3, 8])), device)
    cached = {name: call[name].to(dtype) for name in ("q", "k", "v", "k_cache", "v_cache")}
    outside = moved(call | cached, device)
    inside = moved(call | cached, device)
    if cast:
        inside |= {name: call[name] for name in ("q", "k", "v")}
    options: dict[str, Any] = {"return_lse": True, "backend": backend}
    expected = attention_with_kv_cache(**outside, **options)
    with torch.autocast(device, torch.bfloat16):
        out, lse = attention_with_kv_cache(**inside, **options)
    assert out.dtype == dtype and lse.dtype == expected[1].dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    for name in ("k_cache", "v_cache"):
        assert torch.equal(inside[name], outside[name])


def test_autocast_compiles(device: str) -> None:
    def step(q: torch.Tensor, k_cache: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return attention_with_kv_cache(q, k_cache, k_cache, n, backend="triton")

    torch._dynamo.reset()
    call = moved(arguments(), device)
    given = call["q"], call["k_cache"].half(), call["cache_lengths"]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    assert compiled.dtype == torch.float16 and torch.equal(compiled, step(*given))


@OF_KERNELS
def test_opcheck_and_compile(backend: str, device: str) -> None:
    """One graph for every length, with the caches written in place."""
    call = moved(arguments(k=NEW, v=NEW, cache_lengths=torch.tensor([3, 8])), device)
    call = cast(call, widest(backend))
    positional = (
        call["q"], call["k_cache"], call["v_cache"], call["cache_lengths"], call["k"], call["v"], None, None, None,
        None, None, None, None, False, True, None, None, None, -1, 0, 0.25, 0.0, backend,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastattn.attention_with_kv_cache.default, positional,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

    def step(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, n: torch.Tensor
    ) -> torch.Tensor:
        return attention_with_kv_cache(
            q, k_cache, v_cache, n, k=call["k"], v=call["v"], backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    caches = [[x.clone() for x in (call["k_cache"], call["v_cache"])] for _ in range(2)]
    out = compiled(call["q"], *caches[0], call["cache_lengths"])
    torch.testing.assert_close(out, step(call["q"], *caches[1], call["cache_lengths"]))
    for ours, theirs in zip(*caches):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_captured_by_a_cuda_graph() -> None:
    """One capture serves every length, with pages and appending."""
    q = torch.randn(3, 1, 8, 64, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, 3, 1, 2, 64, device="cuda", dtype=torch.float16)
    k_cache, v_cache = torch.randn(2, 60, 16, 2, 64, device="cuda", dtype=torch.float16)
    table = torch.randperm(60, device="cuda").view(3, 20).int()
    lengths = torch.tensor([1, 2, 3], device="cuda", dtype=torch.int32)

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        return attention_with_kv_cache(q, k_cache, v_cache, lengths, k=k, v=v, block_table=table)

    copies = k_cache.clone(), v_cache.clone()
    step(*copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(k_cache, v_cache)
    for start in (1, 100, 300):
        lengths.copy_(torch.tensor([0, 1, 2], device="cuda") + start)
        copies = k_cache.clone(), v_cache.clone()
        graph.replay()
        torch.testing.assert_close(out, step(*copies))
        assert torch.equal(k_cache, copies[0]) and torch.equal(v_cache, copies[1])
