"""Whether the processes of a run still live: each gives a sign of life and watches one other.

A process that is stopped, or whose machine has gone, closes no connection: the others would wait
for it in a collective until that ends, minutes later. So a thread of each counts on in the run's
store, beside whatever the process computes, saves or compiles, and looks whether the next rank has
counted on, too. That is a ring, so that a round costs a process the same among any number. Who
finds a silent one tells all, and each ends itself: no exception reaches a thread that waits in a
collective.

Time is counted in rounds of one's own, of which a process that was itself stopped has made none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import Store

ROUNDS = 20  # in the time after which a process counts as lost
LOST = "lost"  # the key of the words that end all
LEFT = "left"
BYTES_A_SECOND = 50e6  # at least, of what keeps Python's lock while it copies


class Heartbeat:
    """This process's signs of life, and its watch over the others.

    Args:
        store: of all processes; the calls have a connection of their own.
        rank, count: of this process.
        seconds: without a sign of life, after which a process counts as lost.
    """

    def __init__(self, store: Store, rank: int, count: int, seconds: float) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        self._rank, self._count = rank, count
        self._seconds, self._pause = seconds, seconds / ROUNDS
        self._patience = 0.0  # that this process asks for, beyond `seconds`
        self._number = 0
        self._watched, self._seen, self._missed = rank, "", 0
        self._over, self._clean = threading.Event(), False
        self._store.set(self._key(rank), self._sign())
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._guarding = threading.Thread(target=self._guard, name="heartbeat guard", daemon=True)
        self._beating.start()
        self._guarding.start()

    def stop(self, clean: bool) -> None:
        """End it; `clean` where this process has done its work, so that nobody waits for it."""
        self._clean = clean
        self._over.set()
        self._beating.join(self._seconds)

    @contextlib.contextmanager
    def patient(self, size: int) -> Iterator[None]:
        """Ask for more patience during work that copies `size` bytes under Python's lock."""
        seconds = size / BYTES_A_SECOND
        self._patience += seconds
        if not self._over.is_set():
            self._store.set(self._key(self._rank), self._sign())
        try:
            yield
        finally:
            self._patience -= seconds

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has ended, with its process
            while not self._over.wait(self._pause):
                self._round()
            if self._clean:
                self._store.set(self._key(self._rank), LEFT)
        self._over.set()

    def _guard(self) -> None:
        """End the process where the store is silent, so that its own thread waits."""
        seen, missed = -1, 0
        while not self._over.wait(self._pause):
            missed = missed + 1 if self._number == seen else 0
            seen = self._number
            if missed >= ROUNDS:
                self._end(
                    "the process that keeps the run's store (rank 0, or torchrun's agent) has not "
                    f"answered for {self._seconds:g} s"
                )

    def _round(self) -> None:
        self._number += 1
        self._store.set(self._key(self._rank), self._sign())
        if self._store.check([LOST]):
            self._end(self._store.get(LOST).decode())
        found = self._of_watched()
        self._missed = self._missed + 1 if found == self._seen else 0
        self._seen = found
        if found and self._missed * self._pause >= self._seconds + float(found.split()[1]):
            words = f"rank {self._watched} of {self._count} has given no sign of life for "
            words += f"{self._missed * self._pause:g} s: it is stopped, or its machine has gone"
            self._store.set(LOST, words)
            self._end(words)

    def _of_watched(self) -> str:
        """The last sign of the next rank that has not left; "" where this process is the last."""
        for step in range(1, self._count):
            rank = (self._rank + step) % self._count
            key = self._key(rank)  # which is not there before its first sign
            sign = self._store.get(key).decode() if self._store.check([key]) else "0 0"
            if sign != LEFT:
                if rank != self._watched:
                    self._watched, self._seen = rank, ""
                return sign
        return ""

    def _end(self, words: str) -> None:
        """End this process, when the others had the time to read why."""
        print(
            f"fastattn: rank {self._rank}: {words}. This process ends; the same command goes on "
            "from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(2 * self._pause)
        os._exit(1)

    def _sign(self) -> str:
        return f"{self._number} {self._patience}"

    @staticmethod
    def _key(rank: int) -> str:
        return f"alive {rank}"
