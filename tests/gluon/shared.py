"""Shared memory: allocations, views of them, and the order of accesses to them.

Every access is recorded with a clock's number. Two that conflict must be ordered by what the
partition knows (order.py), whatever the schedule of this run happened to do; and a byte that nothing
has written, or that a TMA load is about to write, cannot be read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from triton.experimental.gluon.language import _layouts as layouts

from . import clusters, running
from .errors import check
from .values import F32, Tensor, is_float, size

Box = tuple[tuple[int, int], ...]  # [from, to) in every dimension of the allocation
WRITES = ("write", "load")
LATE = {
    "mma": "a wgmma may still read it",
    "copy": "a TMA store may still read it",
    "read": "a load may still read it",
    "load": "a TMA load may still write it",
    "write": "another partition's write is unordered",
}


@dataclasses.dataclass
class Access:
    """An access to a box; known to be over where `seen[agent] >= count`.

    `kind` is `write` and `read` (ordinary), `load` (TMA writes), `mma` or `copy` (wgmma, or a TMA
    store, reads).
    """

    kind: str
    agent: int
    count: float
    box: Box
    line: str


def _overlap(a: Box, b: Box) -> bool:
    return all(low < top and bottom < high for (low, high), (bottom, top) in zip(a, b))


def _within(inner: Box, outer: Box) -> bool:
    return all(a <= b and c <= d for (b, c), (a, d) in zip(inner, outer))


class Allocation:
    def __init__(self, dtype: Any, shape: list[int], name: str, program: Any, divided: Any):
        floats = is_float(dtype)
        self.shape, self.name = shape, name
        self.program, self.number = program, len(program.allocations)
        self.divided = divided  # the dimension of which the programs of a cluster have parts
        self.led = False  # of barriers: whether the first program has them for the cluster
        self.accesses: list[Access] = []
        self.barriers: dict[tuple[int, ...], Any] = {}  # by place, where this is memory of barriers
        self.data = np.full(shape, np.nan if floats else 0, F32 if floats else np.int64)
        self.valid = np.zeros(shape, bool)


class Shared:
    """A view (shared_memory_descriptor): a box of an allocation, and the order of its dimensions."""

    def __init__(
        self, allocation: Allocation, dtype: Any, layout: Any, box: Box, axes: tuple[int, ...]
    ):
        self.allocation, self.dtype, self.layout = allocation, dtype, layout
        self.box, self.axes = box, axes

    shape = property(lambda self: [self.box[a][1] - self.box[a][0] for a in self.axes])
    rank = property(lambda self: len(self.axes))
    type = property(lambda self: self)
    element_ty = property(lambda self: self.dtype)
    numel = property(lambda self: math.prod(self.shape))
    nbytes_per_cta = property(lambda self: self.numel * size(self.dtype))

    @property
    def divided(self) -> int | None:
        """The dimension of which the programs of a cluster have parts."""
        whole = self.allocation.divided
        return self.axes.index(whole) if whole in self.axes else None

    @property
    def name(self) -> str:
        fixed = (str(low) for a, (low, _) in enumerate(self.box) if a not in self.axes)
        return self.allocation.name + "".join(f"[{at}]" for at in fixed)

    def of(self, array: np.ndarray) -> np.ndarray:
        """This view of one of the allocation's arrays."""
        part = array[tuple(slice(low, high) for low, high in self.box)]
        fixed = [a for a in range(len(self.box)) if a not in self.axes]
        return part.transpose([*fixed, *self.axes])[(0,) * len(fixed)]

    @property
    def values(self) -> np.ndarray:
        return self.of(self.allocation.data)

    @property
    def valid(self) -> np.ndarray:
        return self.of(self.allocation.valid)

    def _part(self, dim: int, low: int, high: int) -> Box:
        n, axis = self.shape[dim], self.axes[dim]
        check(low >= 0 and high <= n, "bounds", f"index {low}:{high} of {self.name} of {n}")
        start = self.box[axis][0]
        part = (start + low, start + high)
        return tuple(part if a == axis else whole for a, whole in enumerate(self.box))

    def index(self, at: Any) -> Shared:
        box = self._part(0, int(at), int(at) + 1)
        return Shared(self.allocation, self.dtype, self.layout, box, self.axes[1:])

    def of_program(self, program: Any) -> Shared:
        """The same view in another program of the cluster."""
        allocation = clusters.twin(self.allocation, program)
        return Shared(allocation, self.dtype, self.layout, self.box, self.axes)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> Shared:
        check(int(dim) != self.divided, "layout", f"slice of {self.name} across a cluster")
        box = self._part(int(dim), int(start), int(start) + int(length))
        return Shared(self.allocation, self.dtype, self.layout, box, self.axes)

    def permute(self, order: Any) -> Shared:
        order, layout = tuple(int(o) for o in order), self.layout
        if isinstance(layout, layouts.NVMMASharedLayout) and order == (1, 0):
            layout = dataclasses.replace(layout, transposed=not layout.transposed)
        axes = tuple(self.axes[o] for o in order)
        return Shared(self.allocation, self.dtype, layout, self.box, axes)

    def reshape(self, shape: Any) -> Shared:
        """Dimensions of length 1 come and go: these move no data, whatever the swizzle."""
        shape, layout = [int(n) for n in shape], self.layout
        check(self.divided is None, "type", "reshape of a cluster's memory is not emulated")
        axes = tuple(a for a, n in zip(self.axes, self.shape) if n != 1)
        long = [n for n in self.shape if n != 1]
        right = [n for n in shape if n != 1] == long and len(axes) == len(shape)
        check(right, "layout", f"reshape {self.shape} to {shape} is not emulated")
        if isinstance(layout, layouts.NVMMASharedLayout):
            layout = dataclasses.replace(layout, rank=len(shape))
        return Shared(self.allocation, self.dtype, layout, self.box, axes)

    def readable(self, partition: Any, act: str, asynchronous: bool) -> None:
        """Fail unless every write is known to be over, and all of it was written."""
        order = partition.order
        for access in self.allocation.accesses:
            if not running.machine.order or access.kind not in WRITES:
                continue
            if not _overlap(access.box, self.box):
                continue
            late = "before its TMA load was waited for"
            why = late if access.kind == "load" else "unordered with a write"
            text = f"{act} reads {self.name} {why} ({access.line})"
            check(order.seen[access.agent] >= access.count, "race", text)
            if asynchronous and access.kind == "write":
                text = f"{act} reads {self.name} without fence_async_shared after the store ({access.line})"
                check(order.fenced[access.agent] >= access.count, "fence", text)
        check(
            self.valid.all(),
            "poison",
            lambda: f"{act} reads {self.name}, which nothing has written",
        )

    def writable(self, partition: Any, act: str) -> None:
        """Fail unless every access is known to be over."""
        for access in self.allocation.accesses:
            if running.machine.order and _overlap(access.box, self.box):
                text = f"{act} overwrites {self.name} while {LATE[access.kind]} ({access.line})"
                check(partition.order.seen[access.agent] >= access.count, "race", text)

    def record(self, kind: str, agent: int, count: float, line: str) -> Access:
        """Remember an access, and forget those that it makes pointless."""
        accesses = self.allocation.accesses
        if kind in WRITES:
            accesses[:] = [x for x in accesses if not _within(x.box, self.box)]
        else:
            same = (kind, agent, self.box)
            accesses[:] = [x for x in accesses if (x.kind, x.agent, x.box) != same]
        accesses.append(Access(kind, agent, count, self.box, line))
        return accesses[-1]

    def load(self, layout: Any) -> Tensor:
        running.machine.step()
        partition = running.partition()
        self.readable(partition, "load", asynchronous=False)
        self.record("read", partition.agent, partition.now, running.line())
        return Tensor(self.values.copy(), self.dtype, layout)

    def store(self, value: Any) -> None:
        running.machine.step()
        partition = running.partition()
        tile = isinstance(value, Tensor) and value.shape == self.shape
        text = f"store of {getattr(value, 'shape', type(value))} into {self.shape}"
        check(tile and value.dtype.name == self.dtype.name, "type", text)
        self.writable(partition, "store")
        self.values[...] = value.data
        self.valid[...] = True
        self.record("write", partition.agent, partition.now, running.line())

    def _keep_alive(self) -> None:
        """A hint to the compiler."""


def allocate_shared_memory(
    element_ty: Any, shape: Any, layout: Any = None, value: Any = None
) -> Shared:
    program = running.partition().program
    shape, divided = clusters.part([int(n) for n in shape], layout)
    program.shared_bytes += -(-math.prod(shape) * size(element_ty) // 16) * 16
    check(
        program.shared_bytes <= 232448, "shared", f"{program.shared_bytes} bytes of shared memory"
    )
    allocation = Allocation(element_ty, shape, running.assigned() or "memory", program, divided)
    program.allocations.append(allocation)
    box = tuple((0, n) for n in shape)
    view = Shared(allocation, element_ty, layout, box, tuple(range(len(shape))))
    if value is not None:
        view.store(value)
    return view
