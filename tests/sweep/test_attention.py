"""Attention, forward and backward, at every row of the tile table: float64, the numeric rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops.attention.cache import test_cache as cache
from ops.attention.cases import Case, check
from sweep.device import ARCHITECTURE, DEVICE, DTYPES, GPU, HALVES

from fastattn import attention_with_kv_cache
from fastattn.ops.attention import tiles, tuning
from oracle import assert_close_to_reference

# Rows of the table that calls ask for: (row, masking).
Asked = set[tuple[tuple[str | int, ...], str]]

WIDTHS = {
    "float32": (128, 256, 512),
    "float16": (64, 128, 256, 512),
    "bfloat16": (64, 128, 256, 512),
}

CACHE = 700 if GPU else 300  # keys, in parts of 256
FEATURES: dict[str, dict[str, Any]] = {
    tiles.PLAIN: {},
    tiles.FEATURED: {"bias": (1, 0, 0, 0)},
    tiles.CROWDED: {"bias": (1, 0, 0, 0), "mask": (1, 1, 0, 0)},
}
CASES = [
    (dtype, width, masking)
    for masking in reversed(tiles.MASKINGS)  # those that take the longest to compile come first
    for dtype in DTYPES
    for width in WIDTHS[dtype]
]


def kernels_of(masking: str) -> list[str]:
    """Those that a forward and a backward launch; only a bias has the gradient of one."""
    kernels = [tiles.FORWARD, tiles.KEYS, tiles.QUERIES]
    return kernels if masking == tiles.PLAIN else [*kernels, tiles.BIAS]


def of(dtype: str, width: int, masking: str) -> Case:
    """On a GPU with tiles inside the band, on its edge, and at the end of both sequences."""
    size = getattr(torch, dtype).itemsize
    rows = [tiles.tile(k, ARCHITECTURE, size, width, masking) for k in kernels_of(masking)]
    block_m, block_n = max(tile.block_m for tile in rows), max(tile.block_n for tile in rows)
    seqlen_q, more = (3 * block_m + 7, block_n) if GPU else (block_m // 2 + 7, block_n // 2)
    return Case(
        seqlen_q, seqlen_q + more, batch=1, heads=2 if GPU or masking == tiles.PLAIN else 1, kv_heads=1,
        head_dim=width, causal=True, dtype=getattr(torch, dtype), device=DEVICE.type,
        **FEATURES[masking],
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The rows that launchers ask for while the test runs."""
    rows: Asked = set()
    tile = tiles.tile

    def noted(
        kernel: str, architecture: int, bytes_per_element: int, head_dim: int, masking: str
    ) -> tiles.Tile:
        rows.add((tiles.row(kernel, architecture, bytes_per_element, head_dim), masking))
        return tile(kernel, architecture, bytes_per_element, head_dim, masking)

    monkeypatch.setattr(tiles, "tile", noted)
    return rows


def expected(dtype: str, width: int, masking: str, *kernels: str) -> Asked:
    size = getattr(torch, dtype).itemsize
    return {(tiles.row(kernel, ARCHITECTURE, size, width), masking) for kernel in kernels}


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "width", "masking"), CASES)
def test_triton(
    dtype: str, width: int, masking: str, asked: Asked, keep: Callable[[Any], None]
) -> None:
    results = check(of(dtype, width, masking), "triton")
    assert asked >= expected(dtype, width, masking, *kernels_of(masking))
    keep(results)


def cached(dtype: str, width: int, masking: str) -> dict[str, Any]:
    """A decoding step of two sequences whose new key is appended to the cache first.

    Pages and rotary where there is nothing else, chosen rows and a softcap, left padding and all
    that a score can take.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(getattr(torch, dtype))

    call: dict[str, Any] = {
        "q": normal(2, 1, 4, width), "k": normal(2, 1, 2, width), "v": normal(2, 1, 2, width),
        "cache_lengths": torch.tensor([CACHE - 3, 130]), "causal": True,
    }  # fmt: skip
    shape = (2, CACHE)
    if masking == tiles.PLAIN:
        pages = -(-CACHE // 16)
        shape = (2 * pages + 2, 16)
        angles = torch.rand(CACHE, width // 4, generator=g) * 6
        call["block_table"] = torch.randperm(shape[0], generator=g)[:-2].view(2, pages)
        call |= {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": False,
        }
    elif masking == tiles.FEATURED:
        shape = (3, CACHE)
        call |= {"cache_indices": torch.tensor([2, 0]), "softcap": 3.0}
    else:
        call |= {"cache_starts": torch.tensor([40, 3]), "softcap": 3.0, "window": (200, 0)}
        call |= {"alibi_slopes": torch.rand(4, generator=g), "sink": normal(4).float()}
    call["k_cache"], call["v_cache"] = normal(*shape, 2, width), normal(*shape, 2, width)
    return cache.moved(call, DEVICE.type)


def check_cached(call: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results and the caches of a step, under the rule; NaN is where no key is."""
    dtype = call["q"].dtype
    cpu = cache.moved(call, "cpu")
    exact, eager = (cache.formula(cpu, kind) for kind in (torch.float64, dtype))
    # The LSE is float32 for every dtype, of queries and keys that are rounded after their rotation.
    rotated = call.get("rotary_cos") is not None
    eager_lse = eager[1].float() if rotated else cache.formula(cpu, torch.float32)[1]
    mine = cache.poisoned(call)
    out, lse = attention_with_kv_cache(**mine, return_lse=True, backend=backend)
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if call.get("softcap") else {}
    assert_close_to_reference(out, eager[0], exact[0], name="out", **factors)
    assert_close_to_reference(lse, eager_lse, exact[1], name="lse", ulps=16, **factors)
    cache.check_appended(call, mine)
    return {"out": out, "lse": lse, "k_cache": mine["k_cache"], "v_cache": mine["v_cache"]}


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "width", "masking"), CASES)
def test_decode_triton(
    dtype: str, width: int, masking: str, asked: Asked, keep: Callable[[Any], None]
) -> None:
    results = check_cached(cached(dtype, width, masking), "triton")
    assert asked >= expected(dtype, width, masking, tiles.DECODE)
    keep(results)


def test_every_row_is_swept() -> None:
    """The rows that the table has for this architecture are those that the cases above ask for."""
    names = {str(dtype).removeprefix("torch."): name for name, dtype in tuning.DTYPES.items()}
    entries = tuning.entries_of(
        ARCHITECTURE, list(tuning.KERNELS), [names[dtype] for dtype in DTYPES], tuning.HEAD_DIMS,
        tiles.MASKINGS,
    )  # fmt: skip
    swept = {
        row
        for dtype, width, masking in CASES
        for row in expected(dtype, width, masking, *kernels_of(masking), tiles.DECODE)
    }
    assert {(entry.row, entry.masking) for entry in entries} == swept


# --- the `cuda` backend: its kernels are templates of the width -----------------------------------

CUDA = [
    (dtype, width, masking)
    for dtype in HALVES
    for width in (64, 128, 256)
    for masking in (tiles.CROWDED, tiles.PLAIN)
]


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "width", "masking"), CUDA)
def test_cuda(dtype: str, width: int, masking: str, emulator: Emulator) -> None:
    emulator.checks(0)
    check(of(dtype, width, masking), "cuda")


@pytest.mark.long
@pytest.mark.parametrize("masking", tiles.MASKINGS)
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("dtype", HALVES)
def test_decode_cuda(dtype: str, width: int, masking: str, emulator: Emulator) -> None:
    emulator.checks(0)
    check_cached(cached(dtype, width, masking), "cuda")
