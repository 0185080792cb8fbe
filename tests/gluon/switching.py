"""Threads of which exactly one runs: `greenlet` where it is installed, which is faster, else threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

try:
    import greenlet
except ImportError:
    greenlet = None


class _Thread:
    """A thread that waits at its gate until another one opens it."""

    def __init__(self, body: Callable[[], _Thread] | None = None):
        self.gate = threading.Lock()
        self.gate.acquire()
        if body is not None:
            self.thread = threading.Thread(target=self._run, args=(body,), daemon=True)
            self.thread.start()

    def _run(self, body: Callable[[], _Thread]) -> None:
        self.gate.acquire()
        body().gate.release()

    def go_to(self, other: _Thread) -> None:
        """Called by this one: sleep, and let the other run."""
        if other is not self:
            other.gate.release()
            self.gate.acquire()


class _Greenlet:
    def __init__(self, body: Callable[[], _Greenlet] | None = None):
        self.body = body
        self.greenlet: Any = greenlet.getcurrent() if body is None else greenlet.greenlet(self._run)

    def _run(self) -> None:
        assert self.body is not None
        self.body().greenlet.switch()

    def go_to(self, other: _Greenlet) -> None:
        if other is not self:
            other.greenlet.switch()


Fibre: Any = _Thread if greenlet is None else _Greenlet
"""Fibre(body): runs body() once another fibre goes to it; body answers the fibre that runs next.
Fibre(): the caller itself."""
