"""Global memory: the tensors that a launch is given, pointers into them, loads, stores, atomics."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl

from . import clusters, running
from .errors import check
from .order import Order
from .values import AUTO, Tensor, expanded_layout, is_float, layout_name, rounded, tensor

DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
    torch.float64: gl.float64, torch.int32: gl.int32, torch.int64: gl.int64,
    torch.bool: gl.int1, torch.int8: gl.int8, torch.uint8: gl.uint8,
}  # fmt: skip


class Storage:
    """The memory under tensors of one type that share it.

    Every element remembers who wrote it last, so that two writes, or a write and a read, that
    nothing orders are an error. Additions commute: two of them are one only where `ordered`.
    """

    def __init__(self, source: torch.Tensor):
        if source.dtype not in DTYPES:
            raise NotImplementedError(f"the emulator has no tensors of {source.dtype}")
        storage = source.untyped_storage()
        count = storage.nbytes() // source.element_size()
        self.flat = source.detach().new_empty(0).set_(storage, 0, (count,), (1,))
        held = self.flat
        if not source.is_floating_point():
            held = held if source.dtype == torch.bool else held.long()
        elif source.dtype != torch.float64:
            held = held.float()
        self.data = held.numpy().copy()
        # Of the last write: its agent (0: none), its count, and whether it was an addition.
        self.agent, self.count = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.added, self.changed = np.zeros(count, bool), np.zeros(count, bool)
        self.released: dict[int, Order] = {}  # what a semaphore's releases know, by its place
        self.dirty = False

    def finish(self) -> None:
        """Give the tensors their new contents."""
        if self.dirty:
            at = torch.from_numpy(self.changed)
            self.flat[at] = torch.from_numpy(self.data)[at].to(self.flat.dtype)


class Buffer:
    """The memory of one argument: its first element to its last one, and nothing beyond."""

    def __init__(self, name: str, source: torch.Tensor, storage: Storage):
        self.name, self.dtype, self.storage = name, DTYPES[source.dtype], storage
        self.start, self.ordered = source.storage_offset(), False
        last = sum((n - 1) * s for n, s in zip(source.shape, source.stride()))
        part = slice(self.start, self.start + (last + 1 if source.numel() else 0))
        self.data, self.agent, self.count = (
            x[part] for x in (storage.data, storage.agent, storage.count)
        )
        self.added, self.changed = storage.added[part], storage.changed[part]

    def inside(self, at: np.ndarray, act: str) -> None:
        if at.size:
            low, high = int(at.min()), int(at.max())
            text = f"{act} of {self.name} at element {low}..{high} of {self.data.size}"
            check(low >= 0 and high < self.data.size, "bounds", text)

    def after_writes(self, at: np.ndarray, order: Order, act: str, adds: bool = False) -> None:
        """Fail unless the last write of each of these elements is known to be over."""
        if not self.storage.dirty or not running.machine.order:
            return
        agents = self.agent[at]
        if adds and not self.ordered:
            agents = np.where(self.added[at], 0, agents)
        for agent in np.unique(agents[agents > 0]):
            late = self.count[at][agents == agent].max() > order.seen[int(agent)]
            who = running.machine.names[int(agent)]
            check(not late, "global-race", f"{act} of {self.name}: unordered with a write of {who}")

    def read(self, at: np.ndarray, order: Order, act: str) -> np.ndarray:
        self.inside(at, act)
        self.after_writes(at, order, act)
        return self.data[at]

    def write(
        self, at: np.ndarray, values: Any, agent: int, count: int, order: Order, act: str
    ) -> None:
        self.inside(at, act)
        self.after_writes(at, order, act)
        self.data[at] = values
        self._wrote(at, agent, count, False)

    def add(
        self, at: np.ndarray, values: Any, agent: int, count: int, order: Order, act: str
    ) -> None:
        self.inside(at, act)
        self.after_writes(at, order, act, adds=True)
        np.add.at(self.data, at, values)
        self.data[at] = rounded(self.data[at], self.dtype)
        self._wrote(at, agent, count, True)

    def _wrote(self, at: np.ndarray, agent: int, count: int, added: bool) -> None:
        self.agent[at], self.count[at], self.added[at] = agent, count, added
        self.change(at)

    def change(self, at: Any) -> None:
        self.changed[at] = True
        self.storage.dirty = True


class Pointer:
    """A tile of pointers into a buffer, or one pointer (no dimensions)."""

    def __init__(self, buffer: Buffer, at: Any, layout: Any = None):
        self.buffer, self.at, self.layout = buffer, np.asarray(at), layout
        self.dtype = types.SimpleNamespace(element_ty=buffer.dtype)

    shape = property(lambda self: list(self.at.shape))
    type = property(lambda self: self)

    def __add__(self, offset: Any) -> Pointer:
        offset = tensor(offset)
        check(not is_float(offset.dtype), "type", "float added to a pointer")
        if self.layout is not None and offset.layout is not None:
            text = f"pointer {layout_name(self.layout)} + {layout_name(offset.layout)}"
            check(self.layout == offset.layout, "layout", text)
        return Pointer(self.buffer, self.at + offset.data, self.layout or offset.layout)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Pointer:
        return self + (-tensor(offset))

    def expand_dims(self, axis: int) -> Pointer:
        layout = expanded_layout(self.layout, self.shape, axis)
        return Pointer(self.buffer, np.expand_dims(self.at, axis), layout)

    def active(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and mask, in one shape."""
        if mask is None:
            return self.at, np.ones(self.at.shape, bool)
        mask = tensor(mask)
        same = self.shape == [] or mask.shape == [] or mask.layout == self.layout
        check(same, "layout", "mask and pointer layouts differ")
        shape = np.broadcast_shapes(self.at.shape, mask.data.shape)
        return np.broadcast_to(self.at, shape), np.broadcast_to(mask.data, shape)


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, volatile: bool = False, **_: Any
) -> Tensor:
    buffer, (at, active) = pointer.buffer, pointer.active(mask)
    if volatile and at.ndim == 0 and active:
        return _atomic(pointer, lambda old: None, "relaxed", "volatile load")
    partition = running.partition()
    held = np.zeros(at.shape, buffer.data.dtype)
    held[active] = buffer.read(at[active], partition.order, "load")
    if other is None:
        other = np.nan if is_float(buffer.dtype) else -987654321
    elif isinstance(other, Tensor):
        other = other.data
    return Tensor(
        rounded(np.where(active, held, other), buffer.dtype), buffer.dtype, pointer.layout
    )


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    buffer, (at, active), value = pointer.buffer, pointer.active(mask), tensor(value)
    if clusters.divided(pointer.layout, at.ndim) is None and not clusters.leads():
        return  # both programs have the same
    tiles = value.shape and pointer.shape
    same = not tiles or value.layout == pointer.layout or isinstance(value.layout, AUTO)
    check(same, "layout", "value and pointer layouts differ")
    partition = running.partition()
    values = np.broadcast_to(rounded(value.data, buffer.dtype), at.shape)[active]
    now = partition.order.seen[partition.agent]
    buffer.write(at[active], values, partition.agent, now, partition.order, "store")


def _atomic(pointer: Pointer, change: Callable, sem: Any, name: str) -> Tensor:
    """One atomic of a scalar pointer: release, read, write, acquire.

    An atomic that finds what it found before, and changes nothing, is a turn of a loop that waits:
    the partition then waits for a change, so that a wait without end is a deadlock with its line.
    """
    machine, partition, buffer = running.machine, running.partition(), pointer.buffer
    check(clusters.size() == 1, "type", "atomics of a cluster are not emulated")
    sem = sem or "acq_rel"
    check(sem in ("acquire", "release", "acq_rel", "relaxed"), "type", f"semantics {sem}")
    machine.step()
    at = int(pointer.at)
    buffer.inside(pointer.at, name)
    place, released = buffer.start + at, buffer.storage.released
    old = buffer.data[at].copy()
    if change(old) in (None, old) and partition.polled == (place, old, partition.acts - 1):
        text = f"{buffer.name}[{at}] = {old} to change, in {running.line()}"
        partition.block(lambda: buffer.data[at] != old, text, memory=True)
        old = buffer.data[at].copy()
    new = change(old)
    if new is not None:
        buffer.data[at] = rounded(new, buffer.dtype)
        buffer.change(at)
        knows = released.setdefault(place, Order())
        if sem in ("release", "acq_rel"):
            knows.join(partition.order)
            partition.tick()
    if sem in ("acquire", "acq_rel") and place in released:
        partition.order.join(released[place])
    partition.polled = (place, old, partition.acts)
    return Tensor(np.asarray(old), buffer.dtype)


def atomic(f: Callable, name: str) -> Callable:
    """An atomic that puts f(old, value) in place of the old value, and answers the old."""

    def act(
        pointer: Pointer, value: Any, mask: Any = None, sem: Any = None, scope: Any = None
    ) -> Tensor:
        if pointer.shape:
            check(f is np.add, "type", f"{name} of a tile is not emulated")
            return _add_tile(pointer, tensor(value), mask)
        if mask is not None and not bool(tensor(mask)):
            return Tensor(np.asarray(0), pointer.buffer.dtype)
        given = tensor(value).data
        return _atomic(pointer, lambda old: f(old, given), sem, name)

    return act


def atomic_cas(pointer: Pointer, cmp: Any, val: Any, sem: Any = None, scope: Any = None) -> Tensor:
    expected, new = tensor(cmp).data, tensor(val).data
    return _atomic(pointer, lambda old: new if old == expected else None, sem, "atomic_cas")


def _add_tile(pointer: Pointer, value: Tensor, mask: Any) -> Tensor:
    running.machine.step()
    check(clusters.size() == 1, "type", "atomics of a cluster are not emulated")
    partition, buffer, (at, active) = running.partition(), pointer.buffer, pointer.active(mask)
    buffer.inside(at[active], "atomic_add")
    old = np.zeros(at.shape, buffer.data.dtype)
    old[active] = buffer.data[at[active]]
    values = np.broadcast_to(value.data, at.shape)[active]
    now = partition.order.seen[partition.agent]
    buffer.add(at[active], values, partition.agent, now, partition.order, "atomic_add")
    return Tensor(old, buffer.dtype, pointer.layout)
