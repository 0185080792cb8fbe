"""A function in a process of its own, with bounds of memory and time that the kernel holds.

    bounded.run(function, argument, memory=2**26, seconds=10)    # what it returns

The process is forked, so that nothing is imported again. What it may add to the memory that it has
is bounded by RLIMIT_AS: an allocation beyond that raises MemoryError (or whatever a library makes
of it) even if the memory is never touched, and an endless loop is ended by SIGALRM. A crash of the
process is a failure too.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable
from typing import Any


class Failed(AssertionError):
    """The function raised, crashed, or did not end."""


def run(function: Callable[..., Any], *args: Any, memory: int = 2**27, seconds: int = 60) -> Any:
    """The result of `function(*args)`, which may take `memory` more bytes, and `seconds`.

    Raises:
        Failed: with its traceback, or the signal that ended it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(writing, memory, seconds, function, args)
    os.close(writing)
    with open(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise Failed(f"the process was ended by {name}" + " (time)" * (name == "SIGALRM"))
    good, value = pickle.loads(content)
    if not good:
        raise Failed(value)
    return value


def _child(pipe: int, memory: int, seconds: int, function: Callable[..., Any], args: Any) -> None:
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, hard))
        answer = pickle.dumps((True, function(*args)))
    except BaseException:  # pytest's and pyo3's too: nothing may leave this process
        answer = pickle.dumps((False, traceback.format_exc()))
    with open(pipe, "wb") as file:
        file.write(answer)
    os._exit(0)
