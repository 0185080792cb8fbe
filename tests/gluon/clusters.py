"""Clusters of two programs, which run together and reach each other's shared memory and barriers.

A kernel names the tiles of a cluster. A program has its part of one that the layout divides
(`cga_layout`), and all of any other: the emulator's values are these parts, and so are their shapes.
Both make the same allocations in the same order; the first program leads.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language import _layouts as layouts

from . import running
from .errors import check
from .order import Order

SIZES = (1, 2)


class Cluster:
    """The programs of a cluster, and the barrier that all of them reach."""

    def __init__(self) -> None:
        self.programs: list[Any] = []
        self.turn = self.waiting = 0
        self.arriving = self.arrived = Order()


def size() -> int:
    """Programs of a cluster of this launch."""
    return int(running.machine.cluster)


def divided(layout: Any, rank: int) -> int | None:
    """The dimension of a tile that the programs divide; None: each has all of it."""
    root = layout
    while isinstance(root, (layouts.SliceLayout, layouts.DotOperandLayout)):
        root = root.parent
    if isinstance(root, (layouts.AutoLayout, type(None))):
        return None
    bases = [list(x) for x in getattr(layout, "cga_layout", None) or []]
    text = f"a layout of {2 ** len(bases)} programs in a cluster of {size()}: {layout}"
    check(2 ** len(bases) == size(), "layout", text)
    for basis in bases:
        right = sum(basis) <= 1 and all(n in (0, 1) for n in basis)
        check(right, "type", f"cga_layout {bases} is not emulated")
        if 1 in basis:
            return basis.index(1) + rank - len(basis)
    return None


def part(shape: list[int], layout: Any) -> tuple[list[int], int | None]:
    """The shape of a program's part, and the dimension that is divided."""
    dim = divided(layout, len(shape))
    if dim is None:
        return shape, None
    text = f"shape {shape}, of which {size()} programs divide dimension {dim}"
    check(shape[dim] % size() == 0, "layout", text)
    return [n // size() if d == dim else n for d, n in enumerate(shape)], dim


def rank() -> int:
    """The place in its cluster of the program that runs."""
    return int(running.partition().program.rank)


def leads() -> bool:
    return rank() == 0


def twin(allocation: Any, program: Any) -> Any:
    """The same allocation in another program of the cluster."""
    there, number = program.allocations, allocation.number
    text = f"{allocation.name} of {program.name} is used before it is allocated there"
    check(number < len(there), "barrier", text)
    return there[number]


def meet(what: str) -> None:
    """Wait for the other programs, and learn what they know."""
    partition = running.partition()
    cluster, turn = partition.program.cluster, partition.program.cluster.turn
    cluster.arriving.join(partition.order)
    partition.tick()
    cluster.waiting += 1
    if cluster.waiting == len(cluster.programs):
        cluster.turn, cluster.waiting = turn + 1, 0
        cluster.arriving, cluster.arrived = Order(), cluster.arriving
    text = f"{what} in {running.line()}, for the other program of the cluster"
    partition.block(lambda: cluster.turn > turn, text)
    partition.order.join(cluster.arrived)


def barrier(*, cluster: Any = False) -> None:
    """Of a partition: nothing to do. Of a cluster: all programs come to it."""
    if not cluster or size() == 1:
        return
    partition = running.partition()
    outside = not partition.worker and partition.children is None
    check(outside, "type", "a barrier of the cluster inside of warp_specialize")
    meet("barrier(cluster=True)")
