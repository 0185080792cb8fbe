"""Attention on a cache of 8-bit numbers: on every backend against float64, and what is stored."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.attention.cache import test_cache as table
from ops.backends import BACKENDS, widest

from fastattn import attention_with_kv_cache
from fastattn.ops.attention.cache import stored
from fastattn.ops.common import launch
from oracle import assert_close_to_reference

INT8, FLOAT8 = stored.DTYPES
STORED = pytest.mark.parametrize("kind", stored.DTYPES, ids=("int8", "float8"))
EVERYWHERE = pytest.mark.parametrize("backend", BACKENDS)
GARBAGE = {INT8: -128, FLOAT8: math.nan}  # of slots that no sequence uses


def values_of(kind: torch.dtype) -> torch.Tensor:
    """Every finite number of the dtype, in float64, from the lowest to the highest; no -0."""
    codes = torch.arange(256, dtype=torch.uint8).view(kind).double()
    return codes[codes.isfinite()].unique()


def nearest(x: torch.Tensor, scale: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """x / scale as the dtype holds it, in float64: of two that are as near the one with an even code."""
    numbers = values_of(kind)
    scaled = (x.float() / scale).double().clamp(numbers[0], numbers[-1])
    above = torch.searchsorted(numbers, scaled.contiguous()).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    low, high = numbers[below], numbers[above]
    even = (low.to(kind).view(torch.uint8) & 1) == 0
    down, up = scaled - low, high - scaled
    return torch.where((down < up) | ((down == up) & even), low, high)


def drawn(seed: int, dtype: torch.dtype, kind: torch.dtype, device: str) -> dict[str, Any]:
    """A call of the table of test_cache.py, its caches stored, with garbage where no key is."""
    call = table.draw(seed, dtype, "cpu")
    g = torch.Generator().manual_seed(seed)
    batch, kv_heads = call["q"].shape[0], call["k_cache"].shape[2]
    poisoned = table.poisoned(call)
    for name in ("k", "v"):
        shape = (kv_heads,) if torch.rand((), generator=g) < 0.4 else (batch, kv_heads)
        scale = (torch.rand(shape, generator=g) + 0.5) * 2 / torch.tensor(stored_largest(kind))
        cache = poisoned[f"{name}_cache"]
        hidden = cache.isnan()
        held = nearest(cache.nan_to_num(), scale.max(), kind).to(kind)
        held = held.float().masked_fill(hidden, GARBAGE[kind]).to(kind)
        call |= {f"{name}_scale": scale, f"{name}_cache": held}
    return table.moved(call, device)


def stored_largest(kind: torch.dtype) -> float:
    return float(values_of(kind)[-1])


def read(call: dict[str, Any], name: str) -> torch.Tensor:
    """What the sequences have in a cache after a call, (batch, capacity, ...), in float64."""
    cache = call[f"{name}_cache"].cpu().double().nan_to_num()  # NaN is where no query looks
    if call.get("block_table") is not None:
        cache = cache[call["block_table"].cpu().long()].flatten(1, 2)
    elif call.get("cache_indices") is not None:
        cache = cache[call["cache_indices"].cpu()]
    return cache * call[f"{name}_scale"].cpu().double()[..., None, :, None]


def seen(call: dict[str, Any]) -> dict[str, Any]:
    """The call on the values that the caches hold after it, in float64: nothing is appended."""
    kept = ("causal", "window", "softcap", "alibi_slopes", "sink", "cache_starts", "softmax_scale")
    plain = {name: call[name] for name in kept if call.get(name) is not None}
    cpu = table.moved(call, "cpu")
    lengths, q = cpu["cache_lengths"], cpu["q"]
    if call.get("rotary_cos") is not None:
        banded = call.get("causal", True) or call.get("window") not in (None, (-1, -1))
        ahead = torch.arange(q.shape[1]) * int(banded)
        q = torch.stack([table.rotated(cpu, q[b], n + ahead) for b, n in enumerate(lengths)])
    new = 0 if call.get("k") is None else call["k"].shape[1]
    plain |= {"q": q, "cache_lengths": lengths + new}
    return table.moved(plain, "cpu") | {f"{x}_cache": read(call, x) for x in ("k", "v")}


def check(call: dict[str, Any], backend: str) -> None:
    """The numeric rule on what is in the caches after the call, and what has been appended."""
    dtype, before = call["q"].dtype, table.moved(call, "cpu")
    equal = call["k_cache"].shape[-1] == call["v_cache"].shape[-1]
    with_lse = backend != "torch" or equal  # ATen returns an LSE only then
    result = attention_with_kv_cache(**call, return_lse=with_lse, backend=backend)
    out = result[0] if with_lse else result
    assert out.dtype == dtype
    values = seen(call)
    rounded = values | {name: values[name].to(dtype) for name in ("k_cache", "v_cache")}
    exact, eager = table.formula(values, torch.float64), table.formula(rounded, dtype)
    eager_lse = table.formula(rounded, torch.float32)[1]
    hard = bool(call.get("softcap")) or backend == "torch"
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if hard else {}
    ulps = 512 if backend == "torch" and dtype != torch.float32 else 32 if hard else 16
    assert_close_to_reference(out, eager[0], exact[0], name="out", ulps=min(ulps, 32), **factors)
    if with_lse:
        assert result[1].dtype == torch.float32
        assert_close_to_reference(result[1], eager_lse, exact[1], name="lse", ulps=ulps, **factors)
    check_appended(before, table.moved(call, "cpu"))


def check_appended(before: dict[str, Any], after: dict[str, Any]) -> None:
    """New values to the bit, turned keys within one number, and nothing else has changed."""
    kind, untouched = before["k_cache"].dtype, torch.ones(before["k_cache"].shape[:2]).bool()
    new = 0 if before.get("k") is None else before["k"].shape[1]
    for b, n in enumerate(before["cache_lengths"].tolist()):
        for t in range(new):
            place = table.place_of(before, b, n + t)
            untouched[place] = False
            for name in ("k", "v"):
                x, scale = before[name][b, t], before[f"{name}_scale"]
                scale = (scale if scale.dim() == 1 else scale[b])[:, None]
                held = after[f"{name}_cache"][place].double()
                if name == "k" and before.get("rotary_cos") is not None:
                    turned = table.rotated(before, x[None], torch.tensor([n + t]))[0]
                    numbers = values_of(kind)
                    ours, theirs = (
                        torch.searchsorted(numbers, y.contiguous())
                        for y in (held, nearest(turned, scale, kind))
                    )
                    assert (ours - theirs).abs().max() <= 1
                else:
                    assert torch.equal(held, nearest(x, scale, kind))
    for name in ("k_cache", "v_cache"):
        ours, theirs = (x[name].view(torch.uint8) for x in (after, before))
        assert torch.equal(ours[untouched], theirs[untouched])


@EVERYWHERE
@STORED
@pytest.mark.parametrize("seed", range(6))
def test_against_float64(seed: int, kind: torch.dtype, backend: str, device: str) -> None:
    """Pages, shared heads, rotary, windows, ALiBi, sinks, parts; unused slots hold garbage."""
    dtypes = (torch.float16, torch.bfloat16 if backend in ("cuda", "torch") else torch.float32)
    call = drawn(100 + seed, dtypes[seed % 2], kind, device)
    if backend == "torch" and (call.get("softcap") or call.get("sink") is not None):
        call |= {"softcap": 0.0, "sink": None}  # ATen has neither
    if backend == "torch" and device != "cpu":
        pytest.skip("the torch backend of a cache is of a CPU")
    check(call, backend)


@STORED
@pytest.mark.parametrize("head_dim", (64, 128, 256, 72))
def test_widths_of_cuda(head_dim: int, kind: torch.dtype, device: str, emulator: Emulator) -> None:
    """Rows that fill a tile of the kernel and that do not, whole 16 bytes and not."""
    shape = 2, 2, 4, head_dim
    call = table.plain_call(shape, 200, [150, 17], torch.float16, "cpu", new=2)
    scale = torch.full((2,), 3 / stored_largest(kind))
    for name in ("k", "v"):
        held = nearest(call[f"{name}_cache"], scale[0], kind).to(kind)
        call |= {f"{name}_cache": held, f"{name}_scale": scale}
    check(table.moved(call, device), "cuda")


@EVERYWHERE
@STORED
def test_every_number_is_read_exactly(kind: torch.dtype, backend: str, device: str) -> None:
    """Of a sequence with one key the output is its value, and the LSE its score."""
    dtype = widest(backend)
    codes = torch.arange(256, dtype=torch.uint8)
    held = codes.view(kind).view(4, 1, 1, 64)
    nan = held.double().isnan()
    keys = codes.masked_fill(nan.flatten(), 0).view(kind).view(4, 1, 1, 64)
    scale = torch.tensor([0.125])
    q = torch.eye(64, dtype=dtype).view(1, 64, 1, 64).expand(4, -1, -1, -1).contiguous()
    call = table.moved({"q": q, "k_cache": keys, "v_cache": held, "k_scale": scale}, device)
    lengths = torch.ones(4, dtype=torch.int32, device=device)
    if backend == "torch" and device != "cpu":
        pytest.skip("the torch backend of a cache is of a CPU")
    out, lse = attention_with_kv_cache(
        **call, cache_lengths=lengths, v_scale=scale.to(device), causal=False, softmax_scale=1.0,
        return_lse=True, backend=backend,
    )  # fmt: skip
    expected = (held.double() * 0.125).expand_as(q)
    assert torch.equal(out.cpu().isnan(), nan.expand_as(q))
    assert torch.equal(out.cpu().double().nan_to_num(), expected.nan_to_num())
    scores = keys.double().view(4, 1, 64) * 0.125
    torch.testing.assert_close(lse.cpu().double(), scores, rtol=1e-6, atol=1e-6)


@EVERYWHERE
@STORED
@pytest.mark.parametrize("scale", (1.0, 0.0371, 3e-38, 2e38))
def test_what_is_stored(scale: float, kind: torch.dtype, backend: str, device: str) -> None:
    """Numbers, ties between two, their neighbours, what is beyond the range, infinities, NaN."""
    if backend == "torch" and device != "cpu":
        pytest.skip("the torch backend of a cache is of a CPU")
    dtype = widest(backend)
    numbers = values_of(kind)
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties * 1.001, ties * 0.999, numbers * 1.3, numbers * 1e-3])
    x = torch.cat([(x * scale).to(dtype), torch.tensor([math.inf, -math.inf, 0.0]).to(dtype)])
    x = torch.cat([x, x.new_zeros(-len(x) % 240), x.new_full((240,), math.nan)])
    x, scales = x.view(1, -1, 1, 240), torch.tensor([scale], device=device)
    caches = [torch.zeros(1, x.shape[1], 1, 240, dtype=kind, device=device) for _ in range(2)]
    attention_with_kv_cache(
        x[:, :1].to(device), *caches, torch.zeros(1, dtype=torch.int32, device=device),
        k=x.to(device), v=x.to(device), k_scale=scales, v_scale=scales, backend=backend,
    )  # fmt: skip
    expected = nearest(x[:, :-1], torch.tensor(scale), kind)
    for cache in (cache.cpu().double() for cache in caches):
        assert torch.equal(cache[:, :-1], expected)
        assert (cache[:, -1] == 0).all() if kind == INT8 else cache[:, -1].isnan().all()


@STORED
def test_a_gpu_without_float8(
    kind: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before sm_89 the bits are turned by hand: the same results to the bit."""
    call = drawn(7, torch.float16, kind, device)
    expected = attention_with_kv_cache(**table.moved(call, device), backend="triton")
    monkeypatch.setattr(launch, "architecture", lambda device: 80)
    assert torch.equal(attention_with_kv_cache(**call, backend="triton"), expected)


@pytest.mark.parametrize(
    ("backend", "kind"), (("triton", INT8), ("cuda", FLOAT8), ("reference", FLOAT8))
)
def test_compiles(kind: torch.dtype, backend: str, device: str) -> None:
    """One graph for every length, with the caches written in place."""

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        new, scale = q[:, :, :2], torch.full((2,), 0.02, device=q.device)
        return attention_with_kv_cache(
            q, k, v, n, k=new, v=new, k_scale=scale, v_scale=scale, backend=backend
        )

    q = torch.randn(2, 1, 4, 16, device=device).half()
    caches = [torch.zeros(2, 10, 2, 16, dtype=kind, device=device) for _ in range(4)]
    lengths = torch.tensor([3, 8], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, *caches[:2], lengths), step(q, *caches[2:], lengths))
    for ours, theirs in zip(caches[:2], caches[2:]):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert ours.double().any()


@STORED
def test_autocast(kind: torch.dtype, device: str) -> None:
    """q, k and v are cast to autocast's dtype."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, heads, 16, generator=g).to(device) for heads in (4, 2, 2))
    scale = torch.full((2,), 0.03, device=device)
    lengths = torch.tensor([3, 8], device=device)
    results = []
    for cast, given in ((False, (q, k, v)), (True, tuple(x.bfloat16() for x in (q, k, v)))):
        caches = [torch.zeros(2, 10, 2, 16, dtype=kind, device=device) for _ in range(2)]
        with contextlib.nullcontext() if cast else torch.autocast(device, torch.bfloat16):
            out = attention_with_kv_cache(
                given[0], *caches, lengths, k=given[1], v=given[2], k_scale=scale, v_scale=scale,
                backend="reference",
            )  # fmt: skip
        results.append((out, *(x.view(torch.uint8) for x in caches)))
    assert results[0][0].dtype == torch.bfloat16 and all(map(torch.equal, *results))


def arguments(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.zeros(2, 10, 2, 16, dtype=INT8),
        "v_cache": torch.zeros(2, 10, 2, 16, dtype=INT8),
        "cache_lengths": torch.tensor([3, 8]),
        "k_scale": torch.ones(2),
        "v_scale": torch.ones(2, 2),
    }
    return call | changes


NEW = torch.randn(2, 1, 2, 16)
FLOATS = {"k_cache": torch.zeros(2, 10, 2, 16), "v_cache": torch.zeros(2, 10, 2, 16)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_scale": None}, ValueError, "k_scale must be given for a cache of 8-bit numbers"),
        ({"v_scale": None}, ValueError, "v_scale must be given for a cache of 8-bit numbers"),
        (FLOATS, ValueError, "for no other one; got one for a cache of torch.float32"),
        ({"k_scale": 0.1}, TypeError, "k_scale must be a"),
        ({"k_scale": torch.ones(2).half()}, TypeError, r"k_scale must be float32; got torch.fl.*cast"),
        ({"k_scale": torch.ones(4)}, ValueError, r"\(kv_heads,\) = \(2,\) or .* \(2, 2\); got \(4,\)"),
        ({"v_scale": torch.ones(())}, ValueError, r"v_scale must have the shape .* got \(\)"),
        ({"k_scale": torch.tensor([1.0, 0.0])}, ValueError, "k_scale must be finite and positive; got 0"),
        ({"k_scale": torch.tensor([1.0, -2.0])}, ValueError, "finite and positive; got -2"),
        ({"v_scale": torch.tensor([math.inf, 1.0])}, ValueError, "v_scale must be .* got inf"),
        ({"v_scale": torch.tensor([math.nan, 1.0])}, ValueError, "v_scale must be .* got nan"),
        ({"v_cache": torch.zeros(2, 10, 2, 16)}, TypeError, "k_cache and v_cache must have one dtype"),
        ({"v_cache": torch.zeros(2, 10, 2, 16).to(FLOAT8)}, TypeError, "must have one dtype"),
        ({"k_cache": torch.zeros(2, 10, 2, 16).to(torch.float8_e5m2)}, TypeError, "float8_e4m3fn; got"),
        ({"k_cache": torch.zeros(2, 10, 2, 16).byte()}, TypeError, "int8, float8_e4m3fn; got"),
        ({"q": torch.zeros(2, 1, 4, 16, dtype=INT8)}, TypeError, "q must have one of the dtypes"),
        ({"k": NEW.half(), "v": NEW.half()}, TypeError, "k must have q's dtype"),
        ({"k": NEW.to(FLOAT8), "v": NEW.to(FLOAT8)}, TypeError, "k must have q's dtype"),
        ({"k_scale": torch.ones(2, requires_grad=True)}, ValueError, "is for inference"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = arguments(**changes)
    before = call["k_cache"].clone()
    with pytest.raises(error, match=message):
        attention_with_kv_cache(**call)
    assert torch.equal(call["k_cache"].double(), before.double())


@pytest.mark.parametrize("backend", ("reference", "triton", "cuda"))
@pytest.mark.parametrize("scale", (0.0, math.inf, -1.0, math.nan))
def test_unchecked_scales_touch_nothing_outside(
    scale: float, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where they are not read: wrong numbers of that head, and only of that."""
    changes = {"k": NEW.half(), "v": NEW.half(), "q": torch.randn(2, 1, 4, 16).half()}
    call = table.moved(arguments(**changes), device)
    expected = attention_with_kv_cache(**table.moved(call, device), backend=backend)
    table.check_no_values(monkeypatch)
    call["k_scale"] = torch.tensor([1.0, scale], device=device)
    out = attention_with_kv_cache(**call, backend=backend)
    assert torch.equal(out[:, :, :2], expected[:, :, :2])
