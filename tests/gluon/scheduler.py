"""Who runs next: the partitions of a launch, and the copies and products in flight, by a seed.

A partition gives up control at every access to shared memory and every asynchronous operation. Four
schedulers look for different bugs: `random`; `late`, in which copies and products happen when
nobody can run; `eager`, in which they happen at once; and `priority`, in which one partition runs
far ahead of the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from . import running
from .clusters import Cluster
from .copies import Load, Store
from .errors import GluonError, check
from .order import Order
from .products import Product
from .shared import Allocation
from .switching import Fibre

MODES = ("random", "late", "eager", "priority")


class Stopped(BaseException):
    """Ends the partitions of a launch that has failed."""


class Program:
    """A program of the grid, or one of a cluster there: one block of the chip."""

    def __init__(self, number: int, place: tuple[int, int, int], cluster: Cluster):
        self.number, self.place, self.cluster = number, place, cluster
        self.rank = len(cluster.programs)
        self.name = f"program {place}" + (f"/{self.rank}" if running.machine.cluster > 1 else "")
        cluster.programs.append(self)
        self.shared_bytes = self.live = 0
        self.allocations: list[Allocation] = []

    def check_end(self, order: Order, events: list[Any]) -> None:
        """Fail where something is still in flight."""
        end = f"{self.name} ends"
        for event in events:
            if event.program is self and isinstance(event, Load):
                raise GluonError("exit", f"{end} with a TMA load in flight ({event.line})")
        for allocation in self.allocations:
            for access in allocation.accesses:
                if access.kind == "load" and order.seen[access.agent] < access.count:
                    late = "a TMA load was never waited for"
                    raise GluonError("exit", f"{end}, {late} ({access.line})")
            for barrier in allocation.barriers.values():
                if barrier.count is not None and barrier.bytes:
                    raise GluonError("exit", f"{end}, {barrier}")
                for agent, count in barrier.away.items():
                    late = f"{running.machine.names[agent]} may still arrive at {barrier.name}"
                    known = order.seen[agent] >= count or not running.machine.order
                    check(known, "exit", f"{end}, {late}")


class Partition:
    """A group of warps that runs one function: a program, or a part of warp_specialize."""

    def __init__(
        self,
        program: Program,
        name: str,
        body: Callable[[], Any],
        num_warps: int,
        parent: Any = None,
    ):
        agent = running.machine.new_agent
        self.program, self.name, self.body, self.num_warps = program, name, body, num_warps
        self.worker, self.children = parent is not None, None
        self.agent, self.multiplied = agent(name), agent(f"a product of {name}")
        self.copied, self.written = agent(f"a TMA store of {name}"), agent(f"a TMA store of {name}")
        self.order = parent.order.copy() if parent else Order()
        self.tick()
        self.products = self.stores = self.acts = 0
        self.product_queue: list[Product] = []
        self.store_queue: list[Store] = []
        self.polled: Any = None  # by the last atomic: memory.py
        self.done, self.priority = False, running.machine.random.random()
        self.condition: Callable[[], bool] | None = None
        self.waits, self.barrier, self.memory = "", None, False
        self.fibre = Fibre(self.run)

    @property
    def now(self) -> int:
        return self.order.seen[self.agent]

    def tick(self) -> None:
        """Acts from here on are not known to those who learned before."""
        self.order.seen[self.agent] += 1

    def learn(self, agent: int, count: int) -> None:
        """`count` acts of an agent are over."""
        self.order.seen[agent] = max(self.order.seen[agent], count)

    def block(
        self, condition: Callable[[], bool], waits: str, barrier: Any = None, memory: bool = False
    ) -> None:
        """Give up control until the condition holds; `waits` is for a report of a deadlock."""
        self.condition, self.waits, self.barrier, self.memory = condition, waits, barrier, memory
        running.machine.step(force=not condition())
        self.condition, self.memory = None, False

    def ready(self) -> bool:
        return not self.done and (self.condition is None or self.condition())

    def retire(self, left: int) -> None:
        """Wait until at most `left` products are in flight."""
        while len(self.product_queue) > left:
            product = self.product_queue.pop(0)
            product.fire()
            product.retired = True
            self.learn(self.multiplied, product.index)

    def check_end(self) -> None:
        """Fail where a product or a store of this partition was not waited for."""
        late: list[Any] = [("wgmma", x) for x in self.product_queue]
        read = self.order.seen[self.copied]
        late += [("TMA store", x) for x in self.store_queue if x.index > read]
        for what, event in late:
            text = f"{self.name} ends, its {what} was not waited for ({event.line})"
            raise GluonError("exit", text)

    def run(self) -> Any:
        machine = running.machine
        try:
            if machine.error is None:
                machine.partition = self
                self.body()
                self.check_end()
        except Stopped:
            pass
        except BaseException as error:
            machine.fail(error, self.name)
        self.done = True
        return machine.next_fibre()


class Machine:
    """A launch in progress.

    `order`: look for unordered accesses; `strict`: ask for a fence between a barrier's init and the
    first load that signals it; `resident`: programs, or clusters, at once; `waiting`: those not yet
    started; `cluster`: programs of one.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        seed: int,
        mode: str | None,
        order: bool,
        strict: bool,
        limit: int,
        cluster: int = 1,
    ):
        self.cluster = cluster
        self.grid, self.random, self.limit = grid, random.Random(seed), limit
        self.order, self.strict = order, strict
        self.mode = mode or MODES[(seed + seed // 4) % len(MODES)]
        self.stay = 0.5 if self.mode == "priority" else self.random.choice((0.0, 0.3, 0.6))
        self.partition: Partition | None = None
        self.partitions: list[Partition] = []
        self.events: list[Any] = []
        self.names = ["nobody"]
        self.error: BaseException | None = None
        self.steps = self.switches = 0
        self.waiting: list[Callable[[], None]] = []
        self.patient = True
        self.main = Fibre()

    def new_agent(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def run(self, programs: list[Callable[[], None]], resident: int, patient: bool) -> None:
        """Run programs, each given as a function that starts it.

        Where those that run all wait for memory, one more is started, unless `patient`.

        Raises:
            GluonError: a bug of the kernel.
        """
        self.waiting, self.patient = programs[::-1], patient
        for _ in range(min(resident, len(programs))):
            self.waiting.pop()()
        self.main.go_to(self.next_fibre())
        if self.error is not None:
            for partition in self.partitions:
                if not partition.done:
                    self.main.go_to(partition.fibre)
            raise self.error

    def start(self, partition: Partition) -> None:
        partition.program.live += 1
        self.partitions.append(partition)

    def step(self, force: bool = False) -> None:
        """A moment at which anything else may happen; called by the partition that runs."""
        me = self.partition
        assert me is not None
        self.steps += 1
        me.acts += 1
        if not force and me.condition is None and self.random.random() < self.stay:
            return
        me.fibre.go_to(self.next_fibre())
        if self.error is not None:
            raise Stopped
        self.partition = me

    def fail(self, error: BaseException, name: str) -> None:
        """The first error ends the launch; those of the kernel's Python are its bugs too."""
        if self.error is None:
            if not isinstance(error, GluonError):
                kind = "accumulator" if "Flying" in str(error) else "python"
                text = f"{type(error).__name__}: {error}; at {name} {running.line_of(error)}"
                error = GluonError(kind, text)
            self.error = error

    def next_fibre(self) -> Any:
        """Let things happen until a partition is to run, or the launch is over."""
        try:
            while self.error is None:
                choice = self._choose()
                if choice is None:
                    break
                if isinstance(choice, Partition):
                    self.switches += 1
                    return choice.fibre
                self.partition = None
                self.fire(choice)
        except BaseException as error:
            self.fail(error, "-")
        return self.main

    def fire(self, event: Any) -> None:
        if event.fire() and event in self.events:
            self.events.remove(event)

    def _choose(self) -> Any:
        """A partition that can run, a copy or product that can happen, or None at the end."""
        for partition in [x for x in self.partitions if x.done]:
            self._end(partition)
        if not self.partitions:
            return None
        check(self.steps < self.limit, "livelock", f"{self.steps} steps")
        ready = [x for x in self.partitions if x.ready()]
        queues = (x.product_queue for x in self.partitions)
        waiting = (next((x for x in queue if x.result is None), None) for queue in queues)
        events = [*self.events, *(x for x in waiting if x is not None)]
        if not ready and not self.events:
            if self.waiting and not self.patient and any(x.memory for x in self.partitions):
                self.waiting.pop()()
                return self._choose()
            raise GluonError("deadlock", "nobody can run:\n  " + "\n  ".join(self._waits()))
        return self._pick(ready, events)

    def _pick(self, ready: list[Partition], events: list[Any]) -> Any:
        draw = self.random
        if self.mode == "late":
            return draw.choice(ready or events)
        if self.mode == "eager":
            return draw.choice(events or ready)
        if self.mode == "random":
            return draw.choice(ready + events)
        if draw.random() < 0.05:
            for partition in self.partitions:
                partition.priority = draw.random()
        if ready and (not events or draw.random() < 0.8):
            return max(ready, key=lambda x: x.priority)
        return draw.choice(events)

    def _waits(self) -> list[str]:
        """A line for each partition: the line that waits, and for what."""
        return [
            f"{x.name}: {x.waits}" + (f"; {x.barrier}" if x.barrier else "")
            for x in self.partitions
        ]

    def _end(self, partition: Partition) -> None:
        self.partitions.remove(partition)
        program = partition.program
        program.live -= 1
        if program.live:
            return
        program.check_end(partition.order, self.events)
        self.partition = None
        for event in [x for x in self.events if x.program is program]:
            while event in self.events:
                self.fire(event)
        if self.waiting and not any(x.live for x in program.cluster.programs):
            self.waiting.pop()()
