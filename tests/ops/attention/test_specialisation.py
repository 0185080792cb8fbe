"""Changing lengths compiles nothing new.

Every case makes two calls of a typical length, one of them a decode, and then calls of other
lengths, batches, windows and page sizes: no launch of these may need a kernel that the first two
have not compiled already. The two are the one split that the kernels make by length: up to
`tiles.DECODE_ROWS` query rows take the rows of DECODE in the table of tiles. (A bias of one query
is also a bias with one row, which has a kernel of its own; the decode has one query.)

Without a GPU, the file runs itself in a process in which Triton compiles, with `meta` tensors and a
recorder instead of the launcher, and Triton says which kernels the launches would ask for. With a
GPU, what Triton has compiled is counted.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.ops.attention import BlockMask
from fastattn.ops.attention.cache import registration
from fastattn.ops.attention.problem import check, check_varlen
from fastattn.ops.common import launch

ROOT = Path(__file__).parents[3]
ARCHITECTURE = 90

# Ones, primes, multiples of 16 and their neighbours, more and fewer keys than a split has.
LENGTHS = (1, 2, 3, 7, 16, 17, 48, 63, 64, 65, 113, 128, 129, 256, 257, 1000, 2048)
Size = tuple[int, int, int]  # batch, seqlen_q, seqlen_k
PREFILL: Size = (2, 1024, 1024)
DECODE: Size = (2, 1, 1024)
SIZES: tuple[Size, ...] = (
    *((1, n, n) for n in LENGTHS),
    *((16, 1, n) for n in LENGTHS),
    *((1, 1, n) for n in LENGTHS),
    *((3, n, 2 * n + 1) for n in LENGTHS),
    *((17, n, 16) for n in LENGTHS[:-2]),
)

# Strides past 2^31 elements; for `meta` tensors only.
HUGE: tuple[Size, ...] = ((4, 2**18, 2**18), (64, 2**20, 2**20), (64, 1, 2**22))

Features = dict[str, Any]
# name -> the features of a call on (batch, seqlen_q, seqlen_k), on a device
CASES: dict[str, Callable[[Size, str], Features]] = {
    "plain": lambda size, device: {},
    "causal": lambda size, device: {"causal": True},
    "top left": lambda size, device: {"causal": "top_left"},
    "window": lambda size, device: {"causal": True, "window": (size[2] // 3, 0)},
    "window of both sides": lambda size, device: {"window": (size[2] // 2, 1 + size[1] // 5)},
    "softcap": lambda size, device: {"softcap": 30.0, "causal": True},
    "key_lengths": lambda size, device: {"key_lengths": integers(device, *[size[2]] * size[0])},
    "mask": lambda size, device: {"mask": ones(device, size[0], 1, *size[1:])},
    "mask of keys": lambda size, device: {"mask": ones(device, size[0], 1, 1, size[2])},
    "bias": lambda size, device: {"bias": numbers(device, 1, 4, *size[1:])},
    "bias of keys": lambda size, device: {"bias": numbers(device, size[0], 1, 1, size[2])},
    "alibi": lambda size, device: {"alibi_slopes": numbers(device, 4), "causal": True},
    "sink": lambda size, device: {"sink": numbers(device, 4), "causal": True},
    "dropout": lambda size, device: {"dropout_p": 0.1},
    "documents": lambda size, device: {
        "causal": True,
        "document_ids": tuple(torch.zeros(size[0], n, dtype=torch.int32, device=device) for n in size[1:]),
    },
    "blocks": lambda size, device: {"block_mask": blocks(size, device, whole=False)},
    "whole blocks": lambda size, device: {"block_mask": blocks(size, device, whole=True)},
}  # fmt: skip


def numbers(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ones(device: str, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


def integers(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def blocks(size: Size, device: str, *, whole: bool) -> BlockMask:
    """Every tile is kept. Where none has a pattern (a fact of the mask), the kernels load none."""
    _, rows, columns = (-(-n // 64) for n in size)
    patterns = torch.ones(2, 64, 64, dtype=torch.bool)
    mask = BlockMask(
        (columns * torch.arange(rows + 1))[None, None],
        torch.arange(columns).repeat(rows),
        64,
        columns,
        **{} if whole else {"partial": torch.ones(rows * columns), "patterns": patterns},
    )
    mask.tensors = tuple(x.to(device) for x in mask.tensors)
    return mask


# --- calls: of a case, the kernels are launched once for each size -------------------------------

DTYPE = torch.float16


def dense(case: str, size: Size, device: str, heads: int = 4, head_dim: int = 64) -> None:
    """`attention` and its backward, 4 heads of queries to 2 of keys."""
    batch, seqlen_q, seqlen_k = size
    q = numbers(device, batch, seqlen_q, heads, head_dim, dtype=DTYPE)
    k = numbers(device, batch, seqlen_k, (heads + 1) // 2, head_dim, dtype=DTYPE)
    settings, extras = check(q, k, k, **CASES[case](size, device))
    _forward_and_backward(q, k, k, extras, settings)


def packed(case: str, size: Size, device: str) -> None:
    """`attention_varlen` and its backward; of the sequences one is empty, one is shorter."""
    batch, seqlen_q, seqlen_k = size
    lengths = [(seqlen_q, seqlen_k), (0, 0), (seqlen_q // 2, seqlen_k // 3)] * batch
    starts = [[sum(pair[side] for pair in lengths[:n]) for n in range(len(lengths) + 1)] for side in (0, 1)]  # fmt: skip
    q = numbers(device, starts[0][-1], 4, 64, dtype=DTYPE)
    k = numbers(device, starts[1][-1], 2, 64, dtype=DTYPE)
    features = CASES[case]((len(lengths), seqlen_q, seqlen_k), device)
    if case == "documents":
        features["document_ids"] = tuple(
            torch.zeros(len(x), dtype=torch.int32, device=device) for x in (q, k)
        )
    if case == "key_lengths":
        used = features.pop("key_lengths") * 0
        features |= {"seqused_q": used, "seqused_k": used}
    cu_q, cu_k = (integers(device, *x) for x in starts)
    settings, extras = check_varlen(q, k, k, cu_q, cu_k, seqlen_q, seqlen_k, **features)
    _forward_and_backward(q, k, k, extras, settings)


def _forward_and_backward(q: Any, k: Any, v: Any, extras: Any, settings: Any) -> None:
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.attention.call import Learnt

    if settings.dropout_p:
        extras = extras._replace(dropout_seed=torch.zeros(1, dtype=torch.int64, device=q.device))
    out, lse = kernels.forward(q, k, v, extras, settings)
    wanted = Learnt(*(x is not None for x in Learnt.of(extras)))
    kernels.backward(out, lse, out, lse, wanted, q, k, v, extras, settings)


def strided(size: Size, device: str, heads_first: bool = True) -> None:
    """Slices of one projection, or the layout (batch, heads, seqlen, head_dim)."""
    batch, seqlen_q, seqlen_k = size
    sides = []
    for seqlen in (seqlen_q, seqlen_k):
        if heads_first:
            sides.append(numbers(device, batch, 4, seqlen, 64, dtype=DTYPE).transpose(1, 2))
        else:
            sides.append(numbers(device, batch, seqlen, 3, 4, 64, dtype=DTYPE)[:, :, 1])
    settings, extras = check(sides[0], sides[1], sides[1])
    _forward_and_backward(sides[0], sides[1], sides[1], extras, settings)


def cache(
    size: Size,
    device: str,
    *,
    paged: bool = False,
    append: bool = True,
    rotary: bool = False,
    splits: int | None = None,
    window: bool = False,
    padded: bool = False,
    stored: torch.dtype = DTYPE,
) -> None:
    """`attention_with_kv_cache`; a page, where there are pages, has a third of a sequence's keys."""
    batch, seqlen_q, capacity = size
    shape = (batch * 3 + 1, capacity // 3 + 1) if paged else (batch + 1, capacity + seqlen_q)
    keys = numbers(device, *shape, 2, 64, dtype=DTYPE).to(stored)
    scale = None if stored == DTYPE else numbers(device, batch, 2).abs()
    new = numbers(device, batch, seqlen_q, 2, 64, dtype=DTYPE) if append else None
    table = torch.zeros(batch, 3, dtype=torch.int32, device=device) if paged else None
    rows = integers(device, *range(batch))
    angles = numbers(device, capacity + seqlen_q, 16) if rotary else None
    registration._forward(
        numbers(device, batch, seqlen_q, 4, 64, dtype=DTYPE), keys, keys, rows * 0, new, new, table,
        None if paged else rows, rows * 0 if padded else None, angles, angles, scale, scale, False, True,
        splits, None, None, capacity // 2 if window else -1, 0, 0.125, 0.0, "triton",
    )  # fmt: skip


CALLS: dict[str, Callable[[Size, str], None]] = {
    **{f"attention, {case}": functools.partial(dense, case) for case in CASES},
    **{f"attention_varlen, {case}": functools.partial(packed, case) for case in CASES},
    # Strides that are multiples of 8 elements, of none; dimensions of size 1 say nothing.
    "attention, one head of 40": functools.partial(dense, "causal", heads=1, head_dim=40),
    "attention, heads of 59": functools.partial(dense, "causal", heads=4, head_dim=59),
    "attention, one head of 59": functools.partial(dense, "causal", heads=1, head_dim=59),
    "attention, heads first": strided,
    "attention, slices of a projection": functools.partial(strided, heads_first=False),
    "cache": cache,
    "cache, read alone": functools.partial(cache, append=False),
    "cache, splits by occupancy": functools.partial(cache, splits=0),
    "cache, window and left padding": functools.partial(cache, window=True, padded=True),
    "cache, rotary": functools.partial(cache, rotary=True),
    "cache, pages": functools.partial(cache, paged=True),
    "cache, pages, rotary": functools.partial(cache, paged=True, rotary=True, append=True),
    "cache, int8": functools.partial(cache, stored=torch.int8),
    "cache, float8": functools.partial(cache, stored=torch.float8_e4m3fn),
}


# --- the keys of the launches, without a GPU ------------------------------------------------------


def main() -> None:
    """Print, for each case, which sizes need a kernel that the typical ones did not, and which."""
    sys.path.insert(0, str(ROOT / "tests" / "compile"))
    from offline import key_of

    launch.architecture = lambda device: ARCHITECTURE
    launch.multiprocessors = lambda device: 132
    keys: set[str] = set()

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if 0 not in grid:
            keys.add(key_of(kernel, ARCHITECTURE, args, constants))

    launch.launch = record
    report: dict[str, Any] = {}
    for name, call in CALLS.items():
        keys.clear()
        for size in (PREFILL, DECODE):
            call(size, "meta")
        known = set(keys)
        typical = len(known)
        new = {}
        for size in SIZES if "blocks" in name else SIZES + HUGE:
            keys.clear()
            call(size, "meta")
            if keys - known:
                new[str(size)] = sorted(keys - known)
                known |= keys
        report[name] = {"typical": typical, "new": new}
    json.dump(report, sys.stdout)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CALLS)
def test_lengths_are_in_no_key(name: str, report: dict[str, Any]) -> None:
    case = report[name]
    assert case["typical"] >= 2, "the recorder saw no kernel for prefill and decode"
    assert not case["new"], "\n".join(f"{size}: {keys}" for size, keys in case["new"].items())


# --- what Triton compiles, with a GPU -------------------------------------------------------------


def compiled() -> int:
    """Kernels of attention that Triton has compiled for this device since the process began."""
    from triton.runtime.jit import JITFunction

    modules = [x for name, x in sys.modules.items() if name.startswith("fastattn.ops.attention")]
    kernels = {x for module in modules for x in vars(module).values() if type(x) is JITFunction}
    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in kernels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what is compiled for a GPU")
@pytest.mark.parametrize("name", CALLS)
def test_lengths_compile_nothing(name: str) -> None:
    before = compiled()
    for size in (PREFILL, DECODE):
        CALLS[name](size, "cuda")
    typical = compiled()
    for size in SIZES:
        CALLS[name](size, "cuda")
    assert typical, "no kernel of attention was found"
    assert compiled() == typical, f"{typical - before} kernels for the typical lengths"


if __name__ == "__main__":
    main()
