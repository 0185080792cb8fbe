"""wgmma: asynchronous products of a warp group, which retire in order.

A product reads its shared operands at a moment between its issue and the wait that retires it; its
accumulator cannot be used before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from triton.experimental.gluon.language import _layouts as layouts

from . import clusters, running
from .errors import GluonError, check
from .shared import Shared
from .values import Tensor, size


class Product:
    """A product in flight. fire() computes it."""

    def __init__(
        self, partition: Any, a: Any, b: Any, accumulator: Any, adds: bool, shape: list[int]
    ):
        self.a, self.b, self.accumulator, self.adds, self.shape = a, b, accumulator, adds, shape
        self.program, self.index, self.line = partition.program, partition.products, running.line()
        self.result: np.ndarray | None = None
        self.retired = False

    def operand(self, x: Any) -> np.ndarray:
        if isinstance(x, np.ndarray):
            return x
        if not x.valid.all():
            late = f"wgmma ({self.line}) reads {x.name} after it was overwritten"
            raise GluonError("poison", f"{late}, or before it was written")
        return x.values

    def fire(self) -> bool:
        if self.result is None:
            with np.errstate(all="ignore"):
                result = np.ascontiguousarray(self.operand(self.a)) @ self.operand(self.b)
                if self.adds:
                    before = self.accumulator
                    result += before.result if isinstance(before, Product) else before
            self.result = result
        return True


class Flying:
    """The answer of an asynchronous product: only a product or a wait may take it."""

    def __init__(self, product: Product, dtype: Any, layout: Any):
        self.product, self.dtype, self.layout, self.shape = product, dtype, layout, product.shape

    type = property(lambda self: self)


def warpgroup_mma_init(value: Tensor) -> Tensor:
    return value


def _check_operand(x: Any, accumulator: Any) -> None:
    first = accumulator is not None
    swizzled = isinstance(x.layout, layouts.NVMMASharedLayout)
    if isinstance(x, Shared):
        check(swizzled, "layout", "a shared operand needs an NVMMASharedLayout")
        contiguous = size(x.dtype) == 2 or x.layout.transposed != first
        check(contiguous, "layout", "K must be contiguous for this type")
        x.readable(running.partition(), "wgmma", asynchronous=True)
        return
    check(first, "type", "the second operand must be in shared memory")
    dot = isinstance(x.layout, layouts.DotOperandLayout) and x.layout.operand_index == 0
    right = dot and x.layout.parent == accumulator and x.layout.k_width * size(x.dtype) == 4
    text = "a register operand needs DotOperandLayout(0, accumulator's layout, 4 bytes of k)"
    check(right, "layout", text)


def _check_tile(a: Any, b: Any, accumulator: Any) -> None:
    layout, (m, n), k = accumulator.layout, accumulator.shape, a.shape[-1]
    same = a.shape == [m, k] and b.shape == [k, n]
    check(same, "type", f"{a.shape} @ {b.shape} + {[m, n]}")
    check(a.dtype.name == b.dtype.name, "type", f"operands of {a.dtype} and {b.dtype}")
    mma = isinstance(layout, layouts.NVMMADistributedLayout) and layout.version[0] == 3
    check(mma, "layout", "the accumulator must have an NVMMADistributedLayout of version 3")
    warps, there = layout.warps_per_cta, running.partition().num_warps
    groups = math.prod(warps) == there and there % 4 == 0 and warps[0] % 4 == 0
    check(groups, "layout", f"warps {warps} in a partition of {there}")
    _, columns, depth = layout.instr_shape
    whole = m % (16 * warps[0]) == 0 and columns % 8 == 0 and columns <= 256 and n % columns == 0
    deep = depth * size(a.dtype) == 32 and k % depth == 0
    check(whole and deep, "layout", f"tile {m} x {n} x {k} of {layout.instr_shape}")
    rows, columns = (clusters.divided(layout, 2) == dim for dim in (0, 1))
    parts = (a.divided, b.divided) == (0 if rows else None, 1 if columns else None)
    check(parts, "layout", "a cluster divides a product's operands otherwise than its result")


def warpgroup_mma(
    a: Any,
    b: Any,
    acc: Any,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: Any = False,
) -> Any:
    running.machine.step()
    partition = running.partition()
    right = isinstance(b, Shared) and isinstance(a, (Shared, Tensor))
    check(right and isinstance(acc, (Tensor, Flying)), "type", "operands of warpgroup_mma")
    _check_tile(a, b, acc)
    _check_operand(a, acc.layout)
    _check_operand(b, None)
    flying = acc.product is not None and not acc.product.retired
    before = acc.product if flying else acc.data
    partition.products += 1
    first = a if isinstance(a, Shared) else a.data.copy()
    product = Product(partition, first, b, before, bool(use_acc), list(acc.shape))
    for x in (a, b):
        if isinstance(x, Shared):
            x.record("mma", partition.multiplied, partition.products, product.line)
    partition.product_queue.append(product)
    if bool(is_async):
        return Flying(product, acc.dtype, acc.layout)
    partition.retire(0)
    return Tensor(product.result, acc.dtype, acc.layout)


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    running.machine.step()
    check(deps, "type", "warpgroup_mma_wait needs deps")
    running.partition().retire(int(num_outstanding))
    flying = [isinstance(x, Flying) for x in deps]
    results = tuple(
        Tensor(None, x.dtype, x.layout, x.product) if fly else x for x, fly in zip(deps, flying)
    )
    return results[0] if len(results) == 1 else results


def fence_async_shared(cluster: Any = False) -> None:
    running.machine.step()
    partition = running.partition()
    partition.order.fence()
    partition.tick()


TABLE = {
    "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
    "warpgroup_mma_init": warpgroup_mma_init, "fence_async_shared": fence_async_shared,
}  # fmt: skip
