"""What has happened before what: vector clocks.

Everything that acts (a partition, its queue of products, its queue of TMA stores, a barrier) is an
agent with a number, and counts its acts. A partition knows of each agent how many of its acts are
over; it learns of others' by a barrier, a wait, or a semaphore.
"""

from __future__ import annotations


class Clock(dict[int, int]):
    """From an agent's number to how many of its acts are known to be over."""

    def __missing__(self, agent: int) -> int:
        return 0

    def join(self, other: Clock) -> None:
        """Learn all that `other` knows."""
        for agent, count in other.items():
            if count > self[agent]:
                self[agent] = count


class Order:
    """The two clocks of a partition or a barrier.

    Attributes:
        seen: acts that are over for ordinary loads and stores.
        fenced: ordinary stores that are over for TMA and wgmma too, which see shared memory through
            the asynchronous proxy: these are before a `fence_async_shared`.
    """

    def __init__(self) -> None:
        self.seen, self.fenced = Clock(), Clock()

    def copy(self) -> Order:
        twin = Order()
        twin.join(self)
        return twin

    def join(self, other: Order) -> None:
        """Learn all that `other` knows."""
        self.seen.join(other.seen)
        self.fenced.join(other.fenced)

    def fence(self) -> None:
        """Show the asynchronous proxy all that is over."""
        self.fenced.join(self.seen)
