"""The functions of `gl`: tiles, elementwise mathematics, reductions, partitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language import _layouts as layouts

from . import clusters, running
from .errors import check
from .memory import atomic, atomic_cas, load, store
from .shared import allocate_shared_memory
from .values import F32, SCALARS, Tensor, expand_dims, is_float, promoted, reduced, rounded, tensor


def arange(start: Any, end: Any, layout: Any = None) -> Tensor:
    (length,), divided = clusters.part([int(end) - int(start)], layout)
    first = int(start) + (0 if divided is None else clusters.rank() * length)
    return Tensor(np.arange(first, first + length), gl.int32, layout or layouts.AutoLayout())


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tensor:
    value = value.data if isinstance(value, Tensor) else value
    shape, _ = clusters.part([int(n) for n in shape], layout)
    data = rounded(np.full(shape, value), dtype)
    return Tensor(data, dtype, layout or layouts.AutoLayout())


def full_like(
    input: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None
) -> Tensor:
    check(shape is not None or input.divided is None, "type", "full_like across a cluster")
    return full(shape or input.shape, value, dtype or input.dtype, layout or input.layout)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


def zeros_like(input: Tensor, **options: Any) -> Tensor:
    return full_like(input, 0, **options)


def convert_layout(value: Any, layout: Any, assert_trivial: Any = False) -> Tensor:
    check(isinstance(value, Tensor), "type", "convert_layout of what is not a tensor")
    moves = clusters.divided(layout, len(value.shape)) != value.divided
    check(not moves, "type", "convert_layout between the programs of a cluster is not emulated")
    return Tensor(value.data, value.dtype, layout)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """The two tiles of which a last axis of length 2 is made."""
    check(a.shape[-1] == 2, "type", f"split of the shape {a.shape}")
    check(a.divided != len(a.shape) - 1, "type", "split across a cluster")
    auto = layouts.AutoLayout()
    halves = (Tensor(x, a.dtype, auto, divided=a.divided) for x in np.moveaxis(a.data, -1, 0))
    return tuple(halves)  # type: ignore[return-value]


def _reduction(f: Any) -> Callable:
    def reduction(input: Any, axis: Any = None, keep_dims: Any = False, **_: Any) -> Tensor:
        result = reduced(tensor(input), axis, f)
        return expand_dims(result, int(axis)) if keep_dims else result

    return reduction


def reduce(input: Any, axis: Any, combine_fn: Callable, keep_dims: Any = False) -> Any:
    """Fold an axis by a function of the kernel, in halves; of a tuple of tiles, together."""
    tiles = input if isinstance(input, tuple) else (input,)
    axis = int(axis)
    across = any(x.divided == axis for x in tiles)
    check(not across, "type", "a reduction across a cluster is not emulated")
    while tiles[0].shape[axis] > 1:
        halves = [np.split(x.data, 2, axis) for x in tiles]
        first = [Tensor(a, x.dtype, x.layout) for (a, _), x in zip(halves, tiles)]
        second = [Tensor(b, x.dtype, x.layout) for (_, b), x in zip(halves, tiles)]
        folded = combine_fn(*first, *second)
        tiles = folded if isinstance(folded, tuple) else (folded,)
    results = tuple(x if keep_dims else reduced(x, axis, np.add) for x in tiles)  # a sum of one
    return results if isinstance(input, tuple) else results[0]


def _pair(f: Any) -> Callable:
    def pair(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        propagates = getattr(propagate_nan, "name", "NONE") == "ALL"
        act = {np.fmax: np.maximum, np.fmin: np.minimum}[f] if propagates else f
        both_numbers = isinstance(x, SCALARS) and isinstance(y, SCALARS)
        return act(x, y).item() if both_numbers else tensor(x)._with(y, act)

    return pair


def _elementwise(f: Callable) -> Callable:
    def elementwise(x: Any) -> Tensor:
        x = tensor(x)
        if f is np.abs and not is_float(x.dtype):
            return Tensor(rounded(np.abs(x.data), x.dtype), x.dtype, x.layout)
        dtype = x.dtype if is_float(x.dtype) else gl.float32
        with np.errstate(all="ignore"):
            return Tensor(rounded(f(np.asarray(x.data, F32)), dtype), dtype, x.layout)

    return elementwise


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    condition, (dtype, first, second, layout) = tensor(condition), promoted(x, y)
    auto = (layouts.AutoLayout, type(None))
    for value in (x, y):
        tiles = isinstance(value, Tensor) and value.shape and condition.shape
        if tiles and not isinstance(value.layout, auto) and not isinstance(condition.layout, auto):
            check(value.layout == condition.layout, "layout", "where: layouts differ")
    data = rounded(np.where(condition.data, first, second), dtype)
    return Tensor(data, dtype, condition.layout or layout)


def program_id(axis: Any) -> Tensor:
    return Tensor(np.asarray(running.partition().program.place[int(axis)]), gl.int32)


def num_programs(axis: Any) -> Tensor:
    return Tensor(np.asarray(running.machine.grid[int(axis)]), gl.int32)


def device_assert(cond: Any, msg: Any = "", mask: Any = None) -> None:
    check(bool(np.all(tensor(cond).data)), "assert", str(msg))


def run_time_range(*limits: Any, **_: Any) -> Iterator[Tensor]:
    """`range` in a kernel: its numbers are run-time values."""
    return (Tensor(np.asarray(i), gl.int32) for i in range(*(int(x) for x in limits)))


def warp_specialize(
    functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None
) -> Any:
    """The first function runs in this partition, each other one in a partition of its own."""
    from .scheduler import Partition

    machine, parent = running.machine, running.partition()
    check(not parent.worker and parent.children is None, "type", "warp_specialize inside of one")
    workers = functions_and_args[1:]
    registers = worker_num_warps if worker_num_regs is None else worker_num_regs
    right = len(workers) == len(worker_num_warps) == len(registers)
    check(right, "type", "warp_specialize needs warps and registers for each worker")
    check(all(r <= 256 for r in registers), "type", f"registers {registers}: at most 256")
    if clusters.size() > 1:  # the compiler has it where barriers are used across programs
        clusters.meet("the barrier before warp_specialize")
    parent.children = []
    for i, ((function, args), warps) in enumerate(zip(workers, worker_num_warps)):
        name = f"{parent.name}.{i + 1} {function.__name__}"
        body = _call(function, args)
        parent.children.append(Partition(parent.program, name, body, int(warps), parent))
    parent.tick()
    for child in parent.children:
        machine.start(child)
    function, args = functions_and_args[0]
    result, children = function(*args), parent.children
    parent.block(lambda: all(x.done for x in children), "the end of the other partitions")
    for child in children:
        parent.order.join(child.order)
    parent.children = None
    return result


def _call(function: Callable, args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _same(x: Any, _: Any) -> Any:
    return x


TABLE: dict[str, Any] = {
    "allocate_shared_memory": allocate_shared_memory, "warp_specialize": warp_specialize,
    "arange": arange, "full": full, "full_like": full_like, "zeros": zeros,
    "zeros_like": zeros_like, "convert_layout": convert_layout, "expand_dims": expand_dims,
    "set_auto_layout": convert_layout, "where": where, "to_tensor": tensor,
    "permute": lambda x, order: x.permute(order), "reshape": lambda x, shape: x.reshape(shape), "split": split,
    "cast": lambda x, dtype: tensor(x).to(dtype), "reduce": reduce,
    "sum": _reduction(np.add), "max": _reduction(np.fmax), "min": _reduction(np.fmin),
    "maximum": _pair(np.fmax), "minimum": _pair(np.fmin),
    "exp2": _elementwise(np.exp2), "exp": _elementwise(np.exp), "erf": _elementwise(_erf),
    "log2": _elementwise(np.log2), "log": _elementwise(np.log), "sqrt": _elementwise(np.sqrt),
    "abs": _elementwise(np.abs), "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x)),
    "floor": _elementwise(np.floor), "ceil": _elementwise(np.ceil),
    "sin": _elementwise(np.sin), "cos": _elementwise(np.cos),
    "fma": lambda x, y, z: x * y + z, "fdiv": lambda x, y: x / y, "div_rn": lambda x, y: x / y,
    "cdiv": lambda x, div: (x + div - 1) // div, "load": load, "store": store,
    "atomic_add": atomic(np.add, "atomic_add"), "atomic_cas": atomic_cas,
    "atomic_max": atomic(np.maximum, "atomic_max"), "atomic_min": atomic(np.minimum, "atomic_min"),
    "atomic_and": atomic(np.bitwise_and, "atomic_and"), "atomic_or": atomic(np.bitwise_or, "atomic_or"),
    "atomic_xor": atomic(np.bitwise_xor, "atomic_xor"),
    "atomic_xchg": atomic(lambda old, new: new, "atomic_xchg"),
    "program_id": program_id, "num_programs": num_programs, "num_ctas": clusters.size,
    "num_warps": lambda: running.partition().num_warps, "static_range": range,
    "constexpr": lambda x: x, "static_print": print, "device_print": _nothing,
    "static_assert": lambda cond, msg="": check(cond, "assert", str(msg)),
    "device_assert": device_assert, "assume": device_assert,
    "barrier": clusters.barrier, "thread_barrier": _nothing,
    "multiple_of": _same, "max_contiguous": _same, "max_constancy": _same,
}  # fmt: skip
