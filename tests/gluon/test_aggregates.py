"""Classes of a kernel: `gluon.aggregate`."""

from __future__ import annotations

import pytest
import torch
from gluon.errors import GluonError
from gluon.launching import launch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

if not hasattr(gluon, "aggregate"):
    pytest.skip("aggregates need Triton 3.8", allow_module_level=True)

LAYOUT = gl.BlockedLayout([1], [32], [4], [0])


@gluon.aggregate
class Ring:
    slot: gl.tensor
    STAGES: gl.constexpr

    @gluon.jit
    def next(self):
        return Ring((self.slot + 1) % self.STAGES, self.STAGES)


@gluon.aggregate
class Scaled:
    value: gl.tensor
    FACTOR: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, value, factor):
        self.value = value
        self.FACTOR = gl.constexpr(factor)

    @gluon.jit
    def get(self):
        return self.value * self.FACTOR


@gluon.jit
def structures(out, COUNT: gl.constexpr, BUG: gl.constexpr, layout: gl.constexpr):
    ring = Ring(gl.program_id(0), 3)
    for _ in range(COUNT):
        ring = ring.next()
    if BUG:
        ring.other = 4
    total = Scaled(ring.slot, 10).get() + ring.STAGES
    gl.store(out + gl.arange(0, 128, layout), gl.full([128], total, gl.int32, layout))


def test_fields_and_methods() -> None:
    out = torch.zeros(128, dtype=torch.int32)
    launch(structures, (1,), out, 5, False, LAYOUT)
    assert (out == 5 % 3 * 10 + 3).all()


def test_field_that_the_class_lacks() -> None:
    with pytest.raises(GluonError, match="Ring has no field other") as caught:
        launch(structures, (1,), torch.zeros(128, dtype=torch.int32), 5, True, LAYOUT)
    assert caught.value.kind == "type"
