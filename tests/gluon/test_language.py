"""Values of a kernel: rounding, promotion, integers, reductions, errors, the way to the source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon.errors import GluonError
from gluon.launching import launch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LAYOUT = gl.BlockedLayout([1], [32], [4], [0])
STEP = gl.constexpr(3)


@gluon.jit
def rounds(x, narrow, sums, TYPE: gl.constexpr, layout: gl.constexpr):
    at = gl.arange(0, 128, layout)
    value = gl.load(x + at)
    gl.store(narrow + at, value.to(TYPE))
    gl.store(sums + at, (value.to(TYPE) + value.to(TYPE) * 3).to(gl.float32))


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, gl.bfloat16), (torch.float16, gl.float16)])  # fmt: skip
def test_sixteen_bits_are_rounded_like_torch(dtype: torch.dtype, name: Any) -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (128,), dtype=torch.int32).view(torch.float32)
    x = torch.where(x.isnan(), 0.0, x)
    x[:4] = torch.tensor([0.0, -0.0, 1.00390625, 65519.0])  # a tie, the largest half
    narrow, sums = torch.zeros(128, dtype=dtype), torch.zeros(128)
    launch(rounds, (1,), x, narrow, sums, name, LAYOUT)
    y = x.to(dtype)
    assert torch.equal(narrow, y)
    wanted = (y + y * 3).float()
    assert torch.equal(sums.nan_to_num(), wanted.nan_to_num())


@gluon.jit
def integers(x, y, out, layout: gl.constexpr):
    at = gl.arange(0, 128, layout)
    a, b = gl.load(x + at), gl.load(y + at)
    gl.store(out + at, a // b)
    gl.store(out + 128 + at, a % b)
    gl.store(out + 256 + at, (a & b) | (a ^ b))
    gl.store(out + 384 + at, (a << 3) + (a >> 2))
    gl.store(out + 512 + at, gl.abs(a) + gl.maximum(a, b) - gl.minimum(a, -5))


def test_integers_divide_towards_zero() -> None:
    x, y = (torch.randint(-1000, 1000, (128,), dtype=torch.int32) for _ in range(2))
    y = torch.where(y == 0, 7, y).int()
    out = torch.zeros(5 * 128, dtype=torch.int32)
    launch(integers, (1,), x, y, out, LAYOUT)
    wanted = [
        torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y), (x & y) | (x ^ y),
        (x << 3) + (x >> 2), x.abs() + torch.maximum(x, y) - x.clamp(max=-5),
    ]  # fmt: skip
    assert torch.equal(out, torch.cat(wanted))


@gluon.jit
def halves(x, left, right, layout: gl.constexpr):
    at = gl.arange(0, 128, layout)
    first, second = gl.split(gl.load(x + at).reshape((2, 64)).permute((1, 0)))
    half = gl.arange(0, 64, layout)
    gl.store(left + half, gl.convert_layout(first, layout))
    gl.store(right + half, gl.convert_layout(second, layout))


def test_a_tile_is_split_along_its_last_axis() -> None:
    x, left, right = torch.randn(128), torch.zeros(64), torch.zeros(64)
    launch(halves, (1,), x, left, right, LAYOUT)
    assert torch.equal(torch.cat([left, right]), x)


@gluon.jit
def promotes(x, h, n, out, layout: gl.constexpr):
    at = gl.arange(0, 128, layout)
    half = gl.load(h + at)
    gl.static_assert((half + 1.5).dtype == gl.float16)
    gl.static_assert((half + n).dtype == gl.float16)
    gl.static_assert((half + gl.load(x + at)).dtype == gl.float32)
    gl.static_assert((half + half.to(gl.bfloat16)).dtype == gl.float32)
    gl.static_assert((n + 1.5).dtype == gl.float32)
    gl.static_assert((n / 2).dtype == gl.float32)
    gl.static_assert((at + n.to(gl.int64)).dtype == gl.int32)  # a scalar yields to a tile
    gl.static_assert((at + at.to(gl.int64)).dtype == gl.int64)
    gl.store(out + at, gl.where(half > 0, gl.load(x + at), float("nan")))
    gl.store(out + 128 + at, gl.maximum(float("nan"), gl.load(x + at)))


def test_promotion() -> None:
    x, h, out = torch.randn(128), torch.randn(128).half(), torch.zeros(256)
    launch(promotes, (1,), x, h, 3, out, LAYOUT)
    assert torch.equal(out[:128].isnan(), h <= 0)
    assert torch.equal(out[128:], x)  # NaN yields, as in Triton


@gluon.jit
def larger(a, i, b, j):
    take = (b > a) | ((b == a) & (j < i))
    return gl.where(take, b, a), gl.where(take, j, i)


@gluon.constexpr_function
def doubled(n):
    return 2 * n


@gluon.jit
def largest(x, out, layout: gl.constexpr, COUNT: gl.constexpr = 4):
    at = gl.arange(0, 128, layout)
    top, place = gl.reduce((gl.load(x + at), at), 0, larger)
    total = gl.program_id(0) + STEP
    for _ in range(COUNT):
        total += doubled(5)
    gl.store(out + at, gl.where(at == 0, top, gl.where(at == 1, place, total).to(gl.float32)))


def test_reductions_by_a_function_and_constants() -> None:
    x, out = torch.randint(-50, 50, (128,)).float(), torch.zeros(128)
    launch(largest, (1,), x, out, LAYOUT)
    first = (x == x.max()).nonzero()[0].item()
    assert out[:3].tolist() == [x.max(), first, 43]


@gluon.jit
def wrong(x, BUG: gl.constexpr, layout: gl.constexpr, N: gl.constexpr = 0):
    at = gl.arange(0, 128, layout)
    if BUG == "truth":  # noqa: SIM102
        if at > 3:
            gl.store(x, 1.0)
    if BUG == "constant":
        wrong(x, "", layout, gl.program_id(0))
    if BUG == "float":
        gl.store(x + 1.0, 2.0)
    if BUG == "rank":
        gl.store(x + at, at[:, None].to(gl.float32))


@pytest.mark.parametrize("bug, kind", [("truth", "type"), ("constant", "type"), ("float", "type"), ("rank", "layout")])  # fmt: skip
def test_a_compiler_would_refuse_it_too(bug: str, kind: str) -> None:
    with pytest.raises(GluonError) as caught:
        launch(wrong, (1,), torch.zeros(128), bug, LAYOUT)
    assert caught.value.kind == kind, caught.value


@gluon.jit
def unknown(x):
    gl.store(x, gl.inline_asm_elementwise("", "", [x], gl.float32, True, 1))


def test_operation_that_the_emulator_lacks() -> None:
    with pytest.raises(GluonError, match=r"the emulator has no .*inline_asm_elementwise"):
        launch(unknown, (1,), torch.zeros(1))


def test_source_stays_as_it_is() -> None:
    """Nothing of a launch stays in the kernel or its module."""
    before = dict(largest.fn.__globals__)
    launch(largest, (1,), torch.zeros(128), torch.zeros(128), LAYOUT)
    assert largest.fn.__globals__ == before
    with pytest.raises(GluonError):
        launch(wrong, (1,), torch.zeros(128), "truth", LAYOUT)
    test_reductions_by_a_function_and_constants()
