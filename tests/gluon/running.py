"""Which launch is in progress, and which line of which kernel runs."""

from __future__ import annotations

import functools
import linecache
import sys
import threading
from pathlib import Path
from typing import Any

machine: Any = None  # the scheduler.Machine of the launch in progress

# Every module of this folder but the tests, which may have kernels of their own.
_OURS = {str(x) for x in Path(__file__).parent.glob("*.py") if not x.name.startswith("test_")}
_OURS.add(threading.__file__)


def partition() -> Any:
    """The partition (scheduler.Partition) that runs."""
    return machine.partition


def line() -> str:
    """The kernel's line that runs: `function:number 'text'`."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _OURS:
        frame = frame.f_back
    return "?" if frame is None else _text(frame.f_code, frame.f_lineno)


def line_of(error: BaseException) -> str:
    """The innermost line of a kernel through which an error came."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename not in _OURS:
            found = _text(trace.tb_frame.f_code, trace.tb_lineno)
        trace = trace.tb_next
    return found


def assigned() -> str | None:
    """The name on the left of `name = ...` in the kernel's line that runs.

    Where that line is `return ...`, in the line that called.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename not in _OURS:
            source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if not source.startswith("return"):
                name = source.split("=")[0].strip()
                return name if name.isidentifier() else None
        frame = frame.f_back
    return None


@functools.lru_cache(4096)
def _text(code: Any, number: int) -> str:
    source = linecache.getline(code.co_filename, number).strip()[:110]
    return f"{Path(code.co_filename).name}:{number} in {code.co_name} `{source}`"
