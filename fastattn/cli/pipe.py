"""Commands whose output goes to a pipe that somebody may close."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def quietly(command: Callable[[], int]) -> int:
    """Run `command` and return its exit code; 141 if nobody reads its output any more.

    That is how a shell reports a tool that the signal SIGPIPE ends (`fastattn doctor | head -1`).
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here a broken pipe is caught, at the interpreter's exit it is not
    except BrokenPipeError:
        # The interpreter flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
