"""Order between programs: semaphores in global memory, ordered additions, waits without end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon.errors import GluonError
from gluon.launching import launch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from fastattn.ops.common.gluon import REDUCES, tma

adds_by_tma = pytest.mark.skipif(not REDUCES, reason="TMA reductions need Triton 3.8")

SEEDS = range(12)


@gluon.jit
def accumulate(
    total, turns, n, WAIT: gl.constexpr, ACQUIRE: gl.constexpr, RELEASE: gl.constexpr,
    WRITTEN: gl.constexpr, REVERSED: gl.constexpr,
):  # fmt: skip
    """Every program adds its number + 1 to a tile by TMA, in the order of the programs' numbers."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    registers: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    box = tma.make_tensor_descriptor(total, [16, 32], [32, 1], [16, 32], layout)
    tile = gl.allocate_shared_memory(gl.float32, [16, 32], layout)
    turn = gl.program_id(0)
    if REVERSED:
        turn = n - 1 - turn
    tile.store(gl.zeros([16, 32], gl.float32, registers) + (turn + 1).to(gl.float32))
    fence_async_shared()
    if WAIT:
        while gl.atomic_cas(turns, turn, turn, sem=ACQUIRE) != turn:
            pass
    tma.async_atomic_add(box, [0, 0], tile)
    tma.store_wait(0, read_only=WRITTEN)
    gl.atomic_add(turns, 1, sem=RELEASE)


def run(seed: int, n: int = 5, **change: Any) -> None:
    options = {k: change.pop(k) for k in ("resident", "in_order") if k in change}
    total, turns = torch.zeros(16, 32), torch.zeros(1, dtype=torch.int32)
    parts = {"WAIT": True, "ACQUIRE": "acquire", "RELEASE": "release", "WRITTEN": False, "REVERSED": False}  # fmt: skip
    launch(accumulate, (n,), total, turns, n, **{**parts, **change}, seed=seed, ordered=["total"], **options)  # fmt: skip
    assert (total == n * (n + 1) / 2).all()
    assert turns.item() == n


@adds_by_tma
@pytest.mark.parametrize("resident", [1, 2, 5])
@pytest.mark.parametrize("in_order", [False, True])
def test_additions_in_order(resident: int, in_order: bool) -> None:
    for seed in SEEDS:
        run(seed, resident=resident, in_order=in_order)


@adds_by_tma
@pytest.mark.parametrize(
    "change", [{"WAIT": False}, {"ACQUIRE": "relaxed"}, {"RELEASE": "relaxed"}, {"WRITTEN": True}]
)
def test_additions_that_nothing_orders(change: dict[str, Any]) -> None:
    for seed in SEEDS:
        with pytest.raises(GluonError) as caught:
            run(seed, resident=2, **change)
        assert caught.value.kind == "global-race", caught.value
        assert "TMA store of program" in str(caught.value)


@adds_by_tma
def test_program_that_waits_for_a_later_one() -> None:
    """It ends only where there is room for all."""
    run(0, resident=5, in_order=True, REVERSED=True)
    for seed in SEEDS:
        with pytest.raises(GluonError) as caught:
            run(seed, resident=2, in_order=True, REVERSED=True)
        assert caught.value.kind == "deadlock", caught.value
        assert "turns[0] = 0 to change, in test_semaphores.py:" in str(caught.value)


@gluon.jit
def last_one_sums(parts, out, done, n, RELEASE: gl.constexpr):
    """Every program leaves a row; the last one adds them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, 128, layout)
    gl.store(parts + gl.program_id(0) * 128 + at, at.to(gl.float32))
    before = gl.atomic_add(done, 1, sem=RELEASE)
    if before == n - 1:
        total = gl.zeros([128], gl.float32, layout)
        for i in range(n):
            total += gl.load(parts + i * 128 + at)
        gl.store(out + at, total)


def test_last_program_reads_what_others_released() -> None:
    for seed in SEEDS:
        parts, out, done = torch.zeros(4, 128), torch.zeros(128), torch.zeros(1, dtype=torch.int32)
        launch(last_one_sums, (4,), parts, out, done, 4, "acq_rel", seed=seed, resident=4)
        assert torch.equal(out, 4 * torch.arange(128.0))
        with pytest.raises(GluonError) as caught:
            done.zero_()
            launch(last_one_sums, (4,), parts, out, done, 4, "relaxed", seed=seed, resident=4)
        assert caught.value.kind == "global-race"


@gluon.jit
def overlapping(x, y, layout: gl.constexpr):
    at = gl.arange(0, 128, layout)
    if gl.program_id(0) == 0:
        gl.store(x + at, gl.full([128], 1.0, gl.float32, layout))
    else:
        gl.store(y + at, gl.full([128], 2.0, gl.float32, layout))


def test_parts_of_one_tensor_are_one_memory() -> None:
    layout = gl.BlockedLayout([1], [32], [4], [0])
    memory = torch.zeros(256)
    launch(overlapping, (2,), memory[:128], memory[128:], layout)
    assert torch.equal(memory, torch.tensor([1.0, 2.0]).repeat_interleave(128))
    with pytest.raises(GluonError) as caught:
        launch(overlapping, (2,), memory[:128], memory[127:255], layout)
    assert caught.value.kind == "global-race"
    with pytest.raises(GluonError) as caught:
        launch(overlapping, (1,), memory[:127], memory, layout)
    assert caught.value.kind == "bounds"
