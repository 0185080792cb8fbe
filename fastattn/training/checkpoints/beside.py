"""One piece of work that runs beside the caller's, whose error the caller raises later."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Beside:
    """A thread at a time. It ends with the process, whatever it is at."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the work raised, and nobody was told."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` beside the caller; the last one must be over (`wait`)."""
        assert self._thread is None and self._error is None

        # A thread begins on the first GPU, whichever the caller has.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, seconds: float | None = None) -> None:
        """Wait until the work is over, at most so long; its error stays for `wait`."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def wait(self) -> None:
        """Wait until the work is over.

        Raises:
            BaseException: whatever the work raised, once.
        """
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
