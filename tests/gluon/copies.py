"""TMA: descriptors, and copies between global and shared memory that land when the scheduler says.

A load takes its target's contents away when it is issued, and brings the new ones in one or two
pieces. A store reads shared memory later, and writes, or adds to, global memory later still.
"""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import numpy as np
from triton.experimental.gluon.language import _layouts as layouts

from . import clusters, running
from .barriers import Barrier, barrier_at
from .errors import check
from .memory import Buffer, Pointer
from .shared import Access, Shared
from .values import size

BOX = 256  # rows of a box, at most


class Descriptor:
    """A tensor in global memory, cut into boxes; what lies outside of it is read as zeros."""

    def __init__(
        self,
        buffer: Buffer,
        start: int,
        shape: Any,
        strides: Any,
        block: Any,
        layout: Any,
        padding: Any = "zero",
    ):
        self.buffer, self.start, self.layout, self.dtype = buffer, int(start), layout, buffer.dtype
        self.block_shape = [int(n) for n in block]
        self.shape, self.strides = [int(n) for n in shape], [int(n) for n in strides]
        self.box, self.divided = clusters.part(self.block_shape, layout)  # of a program
        self.fill = np.nan if padding == "nan" else 0
        width = size(buffer.dtype)
        swizzled = isinstance(layout, layouts.NVMMASharedLayout)
        check(swizzled, "layout", "a descriptor needs an NVMMASharedLayout")
        ranks = {len(self.shape), len(self.strides), len(self.box)}
        check(len(ranks) == 1 and 1 <= len(self.shape) <= 5, "descriptor", f"ranks {ranks}")
        check(self.strides[-1] == 1, "descriptor", "the last stride must be 1")
        aligned = all(n * width % 16 == 0 for n in (self.start, *self.strides[:-1]))
        check(aligned, "descriptor", "base and strides must be multiples of 16 bytes")
        check(all(n > 0 for n in self.shape), "descriptor", f"empty shape {self.shape}")
        rows = all(0 < n <= BOX for n in self.box[:-1])
        check(rows, "descriptor", f"box {self.box}: sides are 1 to {BOX}")
        wide = self.box[-1] * width >= max(16, layout.swizzle_byte_width)
        fits = wide and layout.element_bitwidth == 8 * width
        check(fits, "descriptor", f"{layout} does not fit the box {self.box}")
        index = np.indices(self.box, np.int64)
        steps = np.reshape(self.strides, (-1, *[1] * len(self.box)))
        self._index, self._steps = index, (index * steps).sum(0)

    type = property(lambda self: self)
    nbytes_per_cta = property(lambda self: math.prod(self.box) * size(self.dtype))

    @property
    def block_type(self) -> Any:
        parts = {"nbytes": self.nbytes_per_cta, "shape": self.block_shape}
        return types.SimpleNamespace(**parts, element_ty=self.dtype)

    def elements(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of the box there: offsets in the buffer, and which of them lie inside the tensor."""
        at = self._steps + (self.start + sum(c * s for c, s in zip(corner, self.strides)))
        inside = np.ones(self.box, bool)
        for dim, (c, n) in enumerate(zip(corner, self.shape)):
            if c < 0 or c + self.box[dim] > n:
                inside &= (self._index[dim] >= -c) & (self._index[dim] < n - c)
        return at, inside

    def corner(self, coord: Any, view: Shared) -> list[int]:
        """Where this program's box begins, after the checks of a copy between it and a view."""
        corner = [int(c) for c in coord]
        if self.divided is not None and self.divided < len(corner):
            corner[self.divided] += clusters.rank() * self.box[self.divided]
        box, there = f"box {self.box} {self.dtype}", f"{view.shape} {view.dtype}"
        same = view.shape == self.box and view.dtype.name == self.dtype.name
        text = f"{box} at {corner} against shared memory {there}"
        check(same and len(corner) == len(self.shape), "type", text)
        text = f"descriptor and shared memory have layouts {self.layout} and {view.layout}"
        check(view.layout == self.layout, "layout", text)
        aligned = corner[-1] * size(self.dtype) % 16 == 0
        check(aligned, "descriptor", "the last coordinate must be a multiple of 16 bytes")
        return corner


class Load:
    """A load in flight. fire() brings a piece, and says whether it was the last."""

    def __init__(
        self, box: Descriptor, corner: list[int], barrier: Barrier, view: Shared, access: Access
    ):
        self.box, self.barrier, self.view, self.access = box, barrier, view, access
        self.program, self.line = barrier.program, access.line
        self.order = running.partition().order.copy()
        self.at, self.inside = box.elements(corner)
        random, rows = running.machine.random, view.shape[0]
        cuts = {0, rows}
        if rows > 1 and random.random() < 0.5:
            cuts.add(random.randrange(1, rows))
        edges = sorted(cuts)
        self.pieces = list(itertools.pairwise(edges))
        random.shuffle(self.pieces)

    def fire(self) -> bool:
        low, high = self.pieces.pop()
        at, inside = self.at[low:high], self.inside[low:high]
        values = np.full(at.shape, self.box.fill, self.view.values.dtype)
        values[inside] = self.box.buffer.read(at[inside], self.order, f"TMA load ({self.line})")
        self.view.values[low:high] = values
        self.view.valid[low:high] = True
        if not self.pieces:
            self.access.count = self.barrier.phase + 1
        self.barrier.receive(values.size * size(self.box.dtype), self.line)
        return not self.pieces


class Store:
    """A store or an addition in flight: fire() reads shared memory first, then changes global."""

    def __init__(
        self,
        box: Descriptor,
        corner: list[int],
        view: Shared,
        partition: Any,
        adds: bool,
        line: str,
    ):
        self.box, self.view, self.adds, self.line = box, view, adds, line
        self.program, self.index, self.agent = (
            partition.program,
            partition.stores,
            partition.written,
        )
        self.order = partition.order.copy()
        self.at, self.inside = box.elements(corner)
        self.values: np.ndarray | None = None

    def read(self) -> None:
        if self.values is None:
            check(
                self.view.valid.all(),
                "poison",
                f"TMA store ({self.line}) reads what was overwritten",
            )
            self.values = self.view.values.copy()

    def fire(self) -> bool:
        if self.values is None:
            self.read()
            return False
        change = self.box.buffer.add if self.adds else self.box.buffer.write
        at, values = self.at[self.inside], self.values[self.inside]
        change(at, values, self.agent, self.index, self.order, f"TMA store ({self.line})")
        return True


def make_tensor_descriptor(
    base: Pointer,
    shape: Any,
    strides: Any,
    block_shape: Any,
    layout: Any,
    padding_option: Any = "zero",
) -> Descriptor:
    return Descriptor(
        base.buffer, int(base.at), shape, strides, block_shape, layout, padding_option
    )


def async_load(
    tensor_desc: Descriptor,
    coord: Any,
    barrier: Shared,
    result: Shared,
    pred: Any = True,
    multicast: Any = False,
    cache_policy: Any = None,
) -> None:
    machine = running.machine
    machine.step()
    if not bool(pred):
        return
    partition, corner = running.partition(), tensor_desc.corner(coord, result)
    check(not barrier.allocation.led, "type", "a load signals each program's own barrier")
    if not bool(multicast):
        _load(tensor_desc, corner, barrier_at(barrier), result)
        barrier_at(barrier).learn(partition)
        return
    check(clusters.size() > 1, "type", "multicast without a cluster")
    check(tensor_desc.divided is None, "layout", "multicast of a box that the programs divide")
    if clusters.leads():
        for program in partition.program.cluster.programs:
            there, into = barrier.of_program(program), result.of_program(program)
            check(program.live, "exit", f"multicast into {program.name}, which has ended")
            _load(tensor_desc, corner, barrier_at(there), into)
        barrier_at(barrier).learn(partition)


def _load(box: Descriptor, corner: list[int], target: Barrier, result: Shared) -> None:
    """Begin to copy into the memory of a program, whose barrier gets the bytes."""
    machine, partition = running.machine, running.partition()
    target.use(partition)
    text = f"no fence_async_shared between the init of {target.name} and the load that signals it"
    check(not machine.strict or target.visible_to_tma(partition), "fence", text)
    result.writable(partition, "TMA load")
    result.valid[...] = False
    access = result.record("load", target.agent, math.inf, running.line())
    machine.events.append(Load(box, corner, target, result, access))


def _store(box: Descriptor, coord: Any, source: Shared, adds: bool) -> None:
    machine = running.machine
    machine.step()
    partition, line = running.partition(), running.line()
    whole = clusters.size() > 1 and box.divided is None
    check(not whole, "type", "a TMA store of what both programs have is not emulated")
    corner = box.corner(coord, source)
    source.readable(partition, "TMA store", asynchronous=True)
    partition.stores += 1
    source.record("copy", partition.copied, partition.stores, line)
    store = Store(box, corner, source, partition, adds, line)
    partition.store_queue.append(store)
    machine.events.append(store)


def async_store(tensor_desc: Descriptor, coord: Any, src: Shared, cache_policy: Any = None) -> None:
    _store(tensor_desc, coord, src, adds=False)


def async_atomic_add(
    tensor_desc: Descriptor, coord: Any, src: Shared, cache_policy: Any = None
) -> None:
    _store(tensor_desc, coord, src, adds=True)


def store_wait(pendings: Any = 0, read_only: Any = True) -> None:
    """Wait until all but `pendings` stores have read shared memory, or else have written too."""
    machine = running.machine
    machine.step()
    partition = running.partition()
    done = partition.stores - int(pendings)
    for store in [x for x in partition.store_queue if x.index <= done]:
        store.read()
        if not read_only:
            while store in machine.events:
                machine.fire(store)
            partition.store_queue.remove(store)
    partition.learn(partition.copied, done)
    if not read_only:
        partition.learn(partition.written, done)


TABLE = {
    "make_tensor_descriptor": make_tensor_descriptor, "store_wait": store_wait,
    "async_load": async_load, "async_copy_global_to_shared": async_load,
    "async_store": async_store, "async_copy_shared_to_global": async_store,
    "async_atomic_add": async_atomic_add,
}  # fmt: skip
