"""The rules of the emulator: for each a tiny kernel that keeps it, and a twin that breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon.errors import GluonError
from gluon.launching import launch
from gluon.scheduler import MODES
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn.ops.common.gluon import mbarrier, tma

SEEDS = range(8)
TILE = gl.NVMMASharedLayout(128, 16)


def broken(kind: str | tuple[str, ...], run: Any) -> GluonError:
    """The error of a run that must fail, of one of these kinds, with the line of a kernel here."""
    with pytest.raises(GluonError) as caught:
        run()
    kinds = (kind,) if isinstance(kind, str) else kind
    assert caught.value.kind in kinds, caught.value
    return caught.value


@gluon.jit
def copy(
    source, target, rows, BYTES: gl.constexpr, FENCE: gl.constexpr, WAIT: gl.constexpr,
    TWICE: gl.constexpr, PHASE: gl.constexpr, STORED: gl.constexpr, INIT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    registers: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    first = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout)
    second = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout)
    bar = mbarrier.allocate_mbarrier()
    mbarrier.init(bar, count=1)
    if INIT:
        fence_async_shared()
    box = tma.make_tensor_descriptor(source, [rows, 64], [64, 1], [64, 64], layout)
    place = tma.make_tensor_descriptor(target, [rows, 64], [64, 1], [64, 64], layout)
    mbarrier.expect(bar, BYTES)
    tma.async_load(box, [32, 0], bar, first)
    if WAIT:
        mbarrier.wait(bar, PHASE)
    tile = first.load(registers) + 1.0
    second.store(tile)
    if FENCE:
        fence_async_shared()
    tma.async_store(place, [0, 0], second)
    if TWICE:
        second.store(tile)
    if STORED:
        tma.store_wait(0)


RIGHT = {"BYTES": 8192, "FENCE": True, "WAIT": True, "TWICE": False, "PHASE": 0, "STORED": True, "INIT": True}  # fmt: skip


def run_copy(seed: int, mode: str | None = None, **change: Any) -> None:
    source = torch.randn(80, 64).bfloat16()
    target = torch.full((80, 64), 7.0).bfloat16()
    launch(copy, (1,), source, target, 80, **{**RIGHT, **change}, seed=seed, mode=mode)
    wanted = torch.cat([source[32:], torch.zeros(16, 64).bfloat16()]) + 1
    assert torch.equal(target[:64], wanted)
    assert (target[64:] == 7).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_copy_of_a_box_that_leaves_the_tensor(seed: int, mode: str) -> None:
    run_copy(seed, mode)


# The change, and what it is found as: half the bytes may end the phase early, which is then a race
# or a load that nobody waits for; the wrong phase passes at once, or never if the load has landed.
COPIES = {
    "load not waited for": ({"WAIT": False}, "race"),
    "wrong phase": ({"PHASE": 1}, ("race", "deadlock")),
    "phase 2": ({"PHASE": 2}, "phase"),
    "no fence before the store": ({"FENCE": False}, "fence"),
    "no fence after init": ({"INIT": False}, "fence"),
    "tile overwritten under the store": ({"TWICE": True}, "race"),
    "store not waited for": ({"STORED": False}, "exit"),
    "bytes that never come": ({"BYTES": 8200}, "deadlock"),
    "more bytes than expected": ({"BYTES": 4096}, ("bytes", "race", "exit")),
}


@pytest.mark.parametrize("name", COPIES)
def test_broken_copy(name: str) -> None:
    change, kind = COPIES[name]
    for seed in SEEDS:
        error = broken(kind, lambda seed=seed: run_copy(seed, **change))
        assert "test_rules.py:" in str(error)


def test_deadlock_says_who_waits_for_what() -> None:
    text = str(broken("deadlock", lambda: run_copy(0, BYTES=8200)))
    assert "program (0, 0, 0): wait(bar, phase 0) in test_rules.py:" in text
    assert "`mbarrier.wait(bar, PHASE)`" in text
    assert "bar: phase 0, 1 of 1 arrived, 8 bytes outstanding" in text


def test_seed_repeats_the_run() -> None:
    results = [launch(copy, (1,), *[torch.zeros(80, 64).bfloat16()] * 2, 80, **RIGHT, seed=5) for _ in range(2)]  # fmt: skip
    assert results[0] == results[1]


@gluon.jit
def chain(a, out, LEFT: gl.constexpr, TAKE: gl.constexpr, DEPTH: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, DEPTH])
    shared = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout)
    rows = gl.arange(0, 64, gl.SliceLayout(1, mma))
    columns = gl.arange(0, 64, gl.SliceLayout(0, mma))
    at = rows[:, None] * 64 + columns[None, :]
    shared.store(gl.load(a + at))
    fence_async_shared()
    zero = gl.zeros([64, 64], gl.float32, mma)
    x = warpgroup_mma(shared, shared, zero, use_acc=False, is_async=True)
    y = warpgroup_mma(shared, shared.permute((1, 0)), zero, use_acc=False, is_async=True)
    z = warpgroup_mma(shared, shared, y, is_async=True)
    x, y, z = warpgroup_mma_wait(LEFT, [x, y, z])
    if TAKE == 0:
        result = x
    elif TAKE == 1:
        result = y
    else:
        result = z
    gl.store(out + at, result)
    warpgroup_mma_wait(0, [z])


@pytest.mark.parametrize("left", range(4))
@pytest.mark.parametrize("take", range(3))
def test_products_retire_in_order(left: int, take: int) -> None:
    a, out = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    d = a.double()
    wanted = [d @ d, d @ d.T, d @ d.T + d @ d][take]
    run = lambda: launch(chain, (1,), a, out, left, take, 16, seed=left)  # noqa: E731
    if take + left < 3:
        run()
        assert (out - wanted).abs().max() < 1e-3
    else:
        broken("accumulator", run)


def test_instruction_must_fit_the_type() -> None:
    a, out = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    broken("layout", lambda: launch(chain, (1,), a, out, 0, 0, 8))


@gluon.jit
def roles(
    out,
    ARRIVALS: gl.constexpr,
    STEP: gl.constexpr,
    COUNT: gl.constexpr,
    INITS: gl.constexpr,
    READS: gl.constexpr,
):
    registers: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar = mbarrier.allocate_mbarrier()
    for _ in gl.static_range(INITS):
        mbarrier.init(bar, count=COUNT)
    gl.warp_specialize(
        [
            (reader, (out, tile, bar, READS, registers)),
            (writer, (tile, bar, ARRIVALS, STEP, registers)),
        ],
        [4],
        [24],
    )


@gluon.jit
def writer(tile, bar, ARRIVALS: gl.constexpr, STEP: gl.constexpr, registers: gl.constexpr):
    tile.store(gl.arange(0, 128, registers))
    for _ in gl.static_range(ARRIVALS):
        mbarrier.arrive(bar, count=STEP)


@gluon.jit
def reader(out, tile, bar, READS: gl.constexpr, registers: gl.constexpr):
    if READS:
        mbarrier.wait(bar, 0)
    gl.store(out + gl.arange(0, 128, registers), tile.load(registers))


ROLES = {
    "an arrival too many": ({"STEP": 3}, "barrier"),
    "an arrival too few": ({"ARRIVALS": 1}, "deadlock"),
    "initialised twice": ({"INITS": 2}, "barrier"),
    "not initialised": ({"INITS": 0}, "barrier"),
    "count of nothing": ({"COUNT": 0}, "barrier"),
    "not waited for": ({"READS": False}, ("race", "poison")),
}


def run_roles(seed: int, **change: Any) -> torch.Tensor:
    out = torch.zeros(128, dtype=torch.int32)
    parts = {"ARRIVALS": 2, "STEP": 1, "COUNT": 2, "INITS": 1, "READS": True, **change}
    launch(roles, (1,), out, **parts, seed=seed)
    return out


def test_partitions_meet_at_a_barrier() -> None:
    for seed in SEEDS:
        assert torch.equal(run_roles(seed), torch.arange(128, dtype=torch.int32))


@pytest.mark.parametrize("name", ROLES)
def test_broken_barrier(name: str) -> None:
    change, kind = ROLES[name]
    for seed in SEEDS:
        broken(kind, lambda seed=seed: run_roles(seed, **change))


@gluon.jit
def registers(x, out, n, BUG: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    other: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    at = gl.program_id(0) * 128 + gl.arange(0, 128, layout)
    value = gl.load(x + at, mask=at < n, other=0.0)
    if BUG == "layout":
        value = value + gl.full([128], 1.0, gl.float32, other)
    if BUG == "warps":
        value = value + gl.full([128], 1.0, gl.float32, gl.BlockedLayout([1], [32], [8], [0]))
    if BUG == "overflow":
        at = at * 2147483647
    if BUG == "assert":
        gl.static_assert(n is None, "n is a constant")
    if BUG == "bounds":
        gl.store(out + at, value)
    if BUG == "shared":
        gl.allocate_shared_memory(gl.float32, [4, 16384], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if BUG == "global-race":
        gl.store(out + (at - gl.program_id(0)), value, mask=at < n)
    if BUG == "python":
        value = value + gl.nothing
    total = gl.sum(value, 0)
    gl.store(out + at, value.to(gl.float16).to(gl.float32) + 0 * total, mask=at < n)


@pytest.mark.parametrize(
    "bug", ["layout", "overflow", "assert", "bounds", "shared", "global-race", "python"]
)
def test_broken_registers_and_global_memory(bug: str) -> None:
    x, out = torch.randn(200), torch.zeros(200)
    broken(bug, lambda: launch(registers, (2,), x, out, 200, bug))


def test_layout_of_the_wrong_number_of_warps() -> None:
    x, out = torch.randn(200), torch.zeros(200)
    assert "8 warps in a partition of 4" in str(broken("layout", lambda: launch(registers, (2,), x, out, 200, "warps")))  # fmt: skip


def test_values_are_rounded_as_their_type() -> None:
    x, out = torch.randn(200), torch.zeros(200)
    launch(registers, (2,), x, out, 200, None)
    assert torch.equal(out, x.half().float())


def run_descriptor(**change: Any) -> None:
    """Descriptors of the host, with one thing changed."""
    source = torch.randn(80, 64).bfloat16()
    parts = {"shape": [80, 64], "strides": [64, 1], "block": [64, 64], "layout": TILE, **change}
    if "start" in parts:
        source = torch.randn(81 * 64).bfloat16()[parts["start"] :].as_strided((80, 64), (64, 1))
    box = TensorDescriptor(
        source, parts["shape"], parts["strides"], parts["block"], parts["layout"]
    )
    out = torch.zeros(64, 64)
    launch(boxes, (1,), box, out, parts.get("column", 0), seed=1)
    assert torch.equal(out[:60], source[20:].float())
    assert (out[60:] == 0).all()


@gluon.jit
def boxes(box, out, column):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = gl.allocate_shared_memory(box.dtype, [64, 64], gl.NVMMASharedLayout(128, 16))
    bar = mbarrier.allocate_mbarrier()
    mbarrier.init(bar, count=1)
    fence_async_shared()
    mbarrier.expect(bar, box.nbytes_per_cta)
    tma.async_load(box, [20, column], bar, tile)
    mbarrier.wait(bar, 0)
    at = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None] * 64
    at = at + gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    gl.store(out + at, tile.load(layout).to(gl.float32))


def test_descriptor_of_the_host() -> None:
    run_descriptor()


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"shape": [90, 64]}, "bounds"),
        ({"column": 4}, "descriptor"),
        ({"block": [32, 64]}, "type"),
        ({"layout": gl.NVMMASharedLayout(64, 16)}, "layout"),
    ],
)
def test_broken_descriptor(change: dict[str, Any], kind: str) -> None:
    broken(kind, lambda: run_descriptor(**change))
