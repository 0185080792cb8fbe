"""The emulator's rules of clusters: a kernel of two programs that keeps them, and what breaks each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon.errors import GluonError
from gluon.launching import launch
from gluon.scheduler import MODES
from gluon.test_rules import broken
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.ops.common import gluon as kernels
from fastattn.ops.common.gluon import mbarrier, tma

pytestmark = pytest.mark.skipif(not kernels.CLUSTERS, reason="Triton has clusters from 3.8")
SEEDS = range(6)
TILES = 4


@gluon.constexpr_function
def accumulator():
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16], cga_layout=[[1, 0]])


@gluon.jit
def produce(right, smem, full, empty, shared, tiles, do: gl.constexpr):
    for i in range(tiles):
        if do["own wait"]:
            mbarrier.wait(empty, i & 1 ^ 1)
        mbarrier.expect(full, do["bytes"])
        if do["shared wait"]:
            mbarrier.wait(shared, i & 1 ^ 1)
        tma.async_load(right, [i * 64, 0], full, smem, multicast=do["multicast"])


@gluon.jit
def consume(out, left, smem, full, empty, shared, tiles, do: gl.constexpr):
    acc = gl.zeros([128, 64], gl.float32, accumulator())
    for i in range(tiles):
        mbarrier.wait(full, i & 1)
        acc = warpgroup_mma(left, smem.permute((1, 0)), acc, is_async=True)
        if do["early"]:
            mbarrier.arrive(shared, count=1)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty, count=1)
        if do["late"]:
            mbarrier.arrive(shared, count=1)
    if do["sum"]:
        acc += gl.sum(acc, 0)[None, :]
    if do["inside"]:
        gl.barrier(cluster=True)
    left.store(acc.to(gl.float16))
    fence_async_shared()
    tma.async_store(out, [0, 0], left)
    tma.store_wait(0)


@gluon.jit
def kernel(left, right, out, tiles, do: gl.constexpr):
    smem = gl.allocate_shared_memory(gl.float16, [128, 64], left.layout)
    other = gl.allocate_shared_memory(gl.float16, [64, 64], right.layout)
    ready = mbarrier.allocate_mbarrier()
    full = mbarrier.allocate_mbarrier()
    empty = mbarrier.allocate_mbarrier()
    shared = mbarrier.allocate_mbarrier(two_ctas=do["led"])
    mbarrier.init(ready, count=1)
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    mbarrier.init(shared, count=1)
    if do["fence"]:
        fence_async_shared()
    mbarrier.expect(ready, 8192)
    tma.async_load(left, [0, 0], ready, smem, multicast=do["left multicast"])
    mbarrier.wait(ready, 0)
    gl.warp_specialize(
        [
            (consume, (out, smem, other, full, empty, shared, tiles, do)),
            (produce, (right, other, full, empty, shared, tiles, do)),
        ],
        [1],
        [24],
    )
    if do["leave"]:
        gl.barrier(cluster=True)


RIGHT = {
    "own wait": True, "shared wait": True, "bytes": 8192, "multicast": True, "early": False,
    "late": True, "sum": False, "inside": False, "led": True, "fence": True,
    "left multicast": False, "leave": True,
}  # fmt: skip


def run(seed: int, mode: str | None = None, programs: int = 2, **change: Any) -> None:
    torch.manual_seed(seed)
    rows = 128 - 40 * (seed % 2)  # the second program's part ends in the box
    left, right = torch.randn(rows, 64).half(), torch.randn(TILES * 64, 64).half()
    out = torch.full((rows, 64), float("nan")).half()
    descs = (
        kernels.descriptor(left, [128, 64], second=(1, 0)),
        kernels.descriptor(right, [64, 64], second=(0, 0)),
        kernels.descriptor(out, [128, 64], second=(1, 0)),
    )
    options = {"seed": seed, "mode": mode, "num_ctas": programs}
    launch(kernel, (1,), *descs, TILES, do={**RIGHT, **change}, **options)
    exact = left.float() @ right.float().view(TILES, 64, 64).sum(0).t()
    torch.testing.assert_close(out.float(), exact, rtol=2e-3, atol=0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_two_programs_share_a_copy(seed: int, mode: str) -> None:
    run(seed, mode)


# The change, and what it is found as.
BUGS: dict[str, tuple[dict[str, Any], str | tuple[str, ...]]] = {
    "copies do not wait for the other program": ({"shared wait": False}, "race"),
    "only the first program's consumer is waited for": ({"led": False}, "race"),
    "released under the product": ({"early": True, "late": False}, "race"),
    "released twice": ({"early": True}, ("race", "barrier", "deadlock")),
    "no release to the other program": ({"late": False}, "deadlock"),
    "the other program ends before the last arrival": ({"leave": False}, "exit"),
    "bytes of one program's copy for both": ({"bytes": 16384}, "deadlock"),
    "a copy each, and bytes of half": ({"bytes": 4096}, ("bytes", "race", "poison", "exit")),
    "a barrier of the cluster inside of a partition": ({"inside": True}, "type"),
    "a sum across the programs": ({"sum": True}, "type"),
    "multicast of a box that is divided": ({"left multicast": True}, "layout"),
    "barriers not fenced": ({"fence": False}, "fence"),
    "expected before the last bytes are there": ({"own wait": False}, ("barrier", "race", "bytes")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_rule_is_found(bug: str) -> None:
    change, kind = BUGS[bug]
    for seed in SEEDS:
        broken(kind, lambda seed=seed: run(seed, **change))


def test_without_multicast_each_program_copies_for_itself() -> None:
    for seed in SEEDS:
        run(seed, **{"multicast": False, "shared wait": False, "late": False})


def test_layouts_are_of_as_many_programs_as_the_launch() -> None:
    assert "2 programs in a cluster of 1" in str(broken("layout", lambda: run(0, programs=1)))


def test_report_of_a_deadlock_names_both_programs() -> None:
    error = str(broken("deadlock", lambda: run(0, late=False)))
    assert "program (0, 0, 0)/0.1 produce: wait(shared of program (0, 0, 0)/0, phase 0)" in error
    assert "program (0, 0, 0)/1: wait(full of program (0, 0, 0)/1, phase 1)" in error


@gluon.jit
def store_both(x, TOGETHER: gl.constexpr):
    bar = mbarrier.allocate_mbarrier()
    mbarrier.init(bar, count=1)
    rows = gl.arange(0, 2, gl.BlockedLayout([1], [32], [4], [0], cga_layout=[[1]]))
    gl.store(x + rows, rows)  # each program its own
    gl.store(x + 2, 7)  # both the same: once
    if TOGETHER:
        gl.barrier(cluster=True)


def test_values_of_a_cluster() -> None:
    for together in (True, False):
        x = torch.zeros(3, dtype=torch.int32)
        launch(store_both, (1,), x, together, num_ctas=2)
        assert x.tolist() == [0, 1, 7]


def test_other_sizes_are_refused() -> None:
    with pytest.raises((NotImplementedError, GluonError), match="clusters of 4"):
        launch(store_both, (1,), torch.zeros(3, dtype=torch.int32), False, num_ctas=4)
