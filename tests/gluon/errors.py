"""The error that a broken kernel raises, and the two ways to raise it."""

from __future__ import annotations

from collections.abc import Callable

from . import running


class GluonError(Exception):
    """A bug in a kernel.

    Attributes:
        kind: one word, for tests: `race` and `fence` (order of accesses to shared memory), `poison`
            (memory read that nothing has written), `accumulator`, `barrier`, `phase`, `bytes`,
            `deadlock`, `livelock`, `exit` (something still in flight at the end), `bounds`,
            `descriptor`, `shared` (too much of it), `global-race`, `layout`, `type`, `assert`,
            `overflow`, and `python` (the source itself raises).
    """

    def __init__(self, kind: str, text: str):
        super().__init__(f"[{kind}] {text}")
        self.kind = kind


def fail(kind: str, text: str) -> None:
    """Raise, with the partition and the line that run.

    Raises:
        GluonError: always.
    """
    partition = running.machine.partition if running.machine else None
    name = partition.name if partition else "-"
    raise GluonError(kind, f"{text}; at {name} {running.line()}")


def check(right: object, kind: str, text: str | Callable[[], str]) -> None:
    """Fail unless `right`. A text that costs time is given as a function."""
    if not right:
        fail(kind, text() if callable(text) else text)
