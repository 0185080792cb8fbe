"""mbarriers: arrivals, bytes that TMA brings, phases, and the knowledge that a wait hands over."""

from __future__ import annotations

from typing import Any

from . import clusters, running
from .errors import GluonError, check
from .order import Order
from .shared import Shared, allocate_shared_memory
from .values import gl


class Barrier:
    """One mbarrier.

    A phase ends when all arrivals and all expected bytes are there; wait(parity) passes once the
    phase of that parity is over. Who waits learns what those who arrived knew.
    """

    def __init__(self, name: str, program: Any):
        self.name, self.count, self.agent = name, None, running.machine.new_agent(name)
        self.program, self.away = program, dict[int, int]()  # acts of another program's partitions
        self.pending = self.phase = self.bytes = 0
        self.arriving = self.arrived = Order()  # of this phase; of those that are over

    def init(self, count: int, partition: Any) -> None:
        check(self.count is None, "barrier", f"{self.name} initialised twice")
        check(count > 0, "barrier", f"{self.name} counts {count}")
        self.count = self.pending = count
        self.phase = self.bytes = 0
        self.arriving, self.arrived = partition.order.copy(), partition.order.copy()
        self.maker, self.made = partition.agent, partition.now
        partition.tick()

    def use(self, partition: Any) -> None:
        check(self.count is not None, "barrier", f"{self.name} used before init")
        known = partition.order.seen[self.maker] >= self.made
        check(known, "barrier", f"{self.name}: init not ordered before this use")

    def visible_to_tma(self, partition: Any) -> bool:
        return partition.order.fenced[self.maker] >= self.made

    def learn(self, partition: Any) -> None:
        """Take what an arriving partition knows."""
        if partition.program is not self.program:
            text = f"arrival at {self.name}, whose program has ended"
            check(self.program.live, "exit", text)
            self.away[partition.agent] = partition.now
        self.arriving.join(partition.order)
        partition.tick()

    def arrive(self, n: int) -> None:
        text = f"{self.name} phase {self.phase}: arrival {n} of {self.count} too many"
        check(n <= self.pending, "barrier", text)
        self.pending -= n
        self.settle(running.line())

    def receive(self, count: int, line: str) -> None:
        """Bytes that the load of a line brings."""
        self.bytes -= count
        self.settle(line)

    def settle(self, line: str) -> None:
        if self.pending:
            return
        if self.bytes < 0:
            over = f"{-self.bytes} bytes more than expected arrived"
            raise GluonError("bytes", f"{self.name} phase {self.phase}: {over} ({line})")
        if self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.arrived = self.arriving.copy()

    def passes(self, parity: int) -> bool:
        return (self.phase & 1) != parity

    def __str__(self) -> str:
        arrived = f"{self.count - self.pending} of {self.count} arrived"
        return f"{self.name}: phase {self.phase}, {arrived}, {self.bytes} bytes outstanding"


def barrier_at(view: Any) -> Barrier:
    """The barrier in a place of shared memory."""
    shared = isinstance(view, Shared) and view.dtype.name == "int64"
    check(shared and all(n == 1 for n in view.shape), "type", "not an mbarrier")
    place = tuple(low for low, _ in view.box)
    allocation, program = view.allocation, view.allocation.program
    if allocation.led:
        program = program.cluster.programs[0]
        allocation = clusters.twin(allocation, program)
    if place not in allocation.barriers:
        slot = f"[{place[0]}]" if len(place) > 1 else ""
        whose = f" of {program.name}" if clusters.size() > 1 else ""
        allocation.barriers[place] = Barrier(f"{allocation.name}{slot}{whose}", program)
    return allocation.barriers[place]


def allocate_mbarrier(batch: Any = None, two_ctas: Any = False) -> Shared:
    """With `two_ctas` one of both programs: the first has it, and waits; both arrive at it."""
    made = allocate_shared_memory(gl.int64, [1] if batch is None else [int(batch), 1])
    check(not two_ctas or clusters.size() == 2, "type", "two_ctas without a cluster of two")
    made.allocation.led = bool(two_ctas)
    return made


def _is_others(mbarrier: Any) -> bool:
    """Whether only the first program of the cluster does this, and another one runs."""
    return bool(mbarrier.allocation.led) and not clusters.leads()


def init(mbarrier: Any, count: Any) -> None:
    running.machine.step()
    if not _is_others(mbarrier):
        times = clusters.size() if mbarrier.allocation.led else 1
        barrier_at(mbarrier).init(int(count) * times, running.partition())


def invalidate(mbarrier: Any) -> None:
    if _is_others(mbarrier):
        return
    barrier = barrier_at(mbarrier)
    outstanding = f"{barrier.name} invalidated with {barrier.bytes} bytes outstanding"
    check(barrier.bytes == 0, "barrier", outstanding)
    barrier.count = None


def expect(mbarrier: Any, bytes_per_cta: Any = None, pred: Any = True) -> None:
    """Arrive once, and name the bytes that TMA will bring (mbarrier.arrive.expect_tx)."""
    running.machine.step()
    if bool(pred):
        barrier, partition = barrier_at(mbarrier), running.partition()
        barrier.use(partition)
        barrier.learn(partition)
        barrier.bytes += int(bytes_per_cta)
        barrier.arrive(1)


def arrive(mbarrier: Any, *, count: Any = 1, pred: Any = True) -> None:
    running.machine.step()
    if bool(pred):
        barrier, partition = barrier_at(mbarrier), running.partition()
        barrier.use(partition)
        barrier.learn(partition)
        barrier.arrive(int(count))


def wait(mbarrier: Any, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if not bool(pred) or _is_others(mbarrier):
        running.machine.step()
        return
    barrier, partition, parity = barrier_at(mbarrier), running.partition(), int(phase)
    check(parity in (0, 1), "phase", f"phase {parity} is not 0 or 1")
    barrier.use(partition)
    text = f"wait({barrier.name}, phase {parity}) in {running.line()}"
    partition.block(lambda: barrier.passes(parity), text, barrier)
    partition.order.join(barrier.arrived)
    partition.learn(barrier.agent, barrier.phase)


def fence_init_release_cluster() -> None:
    """The compiler's barrier of a cluster has one: see language.warp_specialize."""


TABLE = {
    "allocate_mbarrier": allocate_mbarrier, "init": init, "invalidate": invalidate,
    "expect": expect, "arrive": arrive, "wait": wait, "MBarrierLayout": lambda *_, **__: None,
    "fence_init_release_cluster": fence_init_release_cluster,
}  # fmt: skip
