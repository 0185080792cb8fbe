"""Runs a `@gluon.jit` kernel for Hopper on the CPU, and looks for bugs of asynchrony.

A tile is a NumPy array, each partition of warp_specialize a thread of which exactly one runs, and a
seed decides at every access to shared memory and every asynchronous operation who goes on and which
copy lands. Two detectors work together:

- data: shared memory is invalid until written; a TMA load lands when the scheduler says so; a wgmma
  reads its operands at any moment up to the wait that retires it (copies.py, products.py);
- order: vector clocks say of every two conflicting accesses whether barriers, waits and fences
  order them, whatever this run's schedule happened to do (order.py, shared.py, memory.py).

Layouts are checked where an operation asks for one, and never simulated: swizzles, bank conflicts
and registers are the compiler's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import running
from .binding import Function, function
from .clusters import SIZES, Cluster
from .copies import Descriptor
from .memory import Buffer, Pointer, Storage
from .scheduler import Machine, Partition, Program
from .values import tensor


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_ctas: int = 1,
    seed: int = 0,
    mode: str | None = None,
    order: bool = True,
    strict: bool = True,
    resident: int = 1,
    in_order: bool = False,
    ordered: Sequence[str] = (),
    steps: int = 10**7,
    **constants: Any,
) -> dict[str, Any]:
    """Run a kernel over a grid; CPU tensors are global memory, and get their results in place.

    Args:
        kernel: a `@gluon.jit` function, or the Python function in one.
        grid: one to three numbers of programs, or of clusters.
        args: tensors, host TensorDescriptors, numbers and constants, in the kernel's order.
        num_warps: of a program, outside of the workers of warp_specialize.
        num_ctas: programs of a cluster.
        seed: of the schedule; the same seed repeats the run.
        mode: one of scheduler.MODES; by default the seed's.
        order: look for unordered accesses by vector clocks.
        strict: ask for fence_async_shared between a barrier's init and the first load on it.
        resident: programs, or clusters, that run at once.
        in_order: start programs by their number, x first, as a chip does, and never more than
            `resident`: then a program may only wait for one of a lower number. By default they
            start in random order, and one more where all that run wait for global memory.
        ordered: names of tensors to which programs may only add in an order that the kernel makes.
        steps: operations after which the launch is a livelock.
        constants: arguments by name.

    Returns:
        `steps`, `switches` (between partitions) and `mode`.

    Raises:
        GluonError: a bug in the kernel.
        NotImplementedError: an operation that the emulator does not have (inside a GluonError of
            kind `python` where a kernel reaches it).
    """
    code = function(getattr(kernel, "fn", kernel))
    sizes = (*(int(n) for n in grid), 1, 1)[:3]
    if num_ctas not in SIZES:
        raise NotImplementedError(f"the emulator has no clusters of {num_ctas}")
    before = running.machine
    machine = Machine(sizes, seed, mode, order, strict, steps, num_ctas)
    running.machine = machine
    try:
        storages: dict[Any, Storage] = {}
        values = {
            n: _value(n, x, code, storages)
            for n, x in {**dict(zip(code.names, args)), **constants}.items()
        }
        for name in ordered:
            values[name].buffer.ordered = True
        places = [
            (x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])
        ]
        if not in_order:
            machine.random.shuffle(places)
        programs = [
            _program(machine, i, at, code, values, num_warps) for i, at in enumerate(places)
        ]
        machine.run(programs, resident, patient=in_order)
    finally:
        running.machine = before
    for storage in storages.values():
        storage.finish()
    return {"steps": machine.steps, "switches": machine.switches, "mode": machine.mode}


def _program(
    machine: Machine,
    number: int,
    place: Any,
    code: Function,
    values: dict[str, Any],
    num_warps: int,
) -> Callable[[], None]:
    def start() -> None:
        cluster = Cluster()
        for _ in range(machine.cluster):
            program = Program(number, place, cluster)
            machine.start(Partition(program, program.name, lambda: code(**values), num_warps))

    return start


def _value(name: str, value: Any, code: Function, storages: dict[Any, Storage]) -> Any:
    """An argument as the kernel sees it."""
    if isinstance(value, torch.Tensor):
        return Pointer(_buffer(name, value, storages), 0)
    if isinstance(value, TensorDescriptor):
        buffer, padding = _buffer(name, value.base, storages), getattr(value, "padding", "zero")
        parts = (value.shape, value.strides, value.block_shape, value.layout, padding)
        return Descriptor(buffer, 0, *parts)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return tensor(value) if number and name not in code.constants else value


def _buffer(name: str, source: torch.Tensor, storages: dict[Any, Storage]) -> Buffer:
    """Arguments that share memory, such as parts of one tensor, share what is known of it."""
    place = (source.untyped_storage().data_ptr(), source.dtype)
    if place not in storages:
        storages[place] = Storage(source)
    return Buffer(name, source, storages[place])
