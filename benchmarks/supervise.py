"""Measuring in another process, which may hang, crash or lose the GPU without taking us along."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from checkout import ROOT
from schema import Row, Skipped

STARTING = 90.0  # seconds that the process has to import torch and open the GPU
OVERTIME = 10.0  # seconds that a cell in progress may still take when the time is over
RESTARTS = 5
TIME_IS_OVER = "the time was over"
BACKEND_VARIABLES = ("FASTATTN_BACKEND", "FASTATTN_TRITON_ON_CPU", "TRITON_INTERPRET")


def measure(
    command: Sequence[str], titles: Sequence[str], done: Sequence[Row], end: float | None
) -> Iterator[str | Row | Skipped]:
    """Run a measuring process over the cells called `titles`; another one after a cell that broke.

    Args:
        command: of the process; `--skip` and the numbers of cells that need no measuring follow.
        titles: of its cells, in its order.
        done: rows that are there already.
        end: the monotonic time after which no cell is begun; None for no end.

    Yields:
        The title of each cell when it begins, then its row; at last the cells left out, and why.
    """
    there = {row["title"] for row in done}
    waiting = [title for title in titles if title not in there]
    why: str | None = None
    for _ in range(1 + RESTARTS):
        if not waiting:
            return
        if end is not None and time.monotonic() > end:
            why = TIME_IS_OVER
            break
        skip = [str(number) for number, title in enumerate(titles) if title not in waiting]
        title, why = None, None
        for event in run([*command, "--skip", *skip], end):
            if "row" in event:
                waiting.remove(event["row"]["title"])
                yield event["row"]
            elif "cell" in event:
                title = event["cell"]
                yield title
            else:
                why = event["why"]
        if why in (None, TIME_IS_OVER):
            break
        if title not in waiting:  # between two cells, or before the first
            title = waiting[0]
        waiting.remove(title)
        yield broken(title, why)
    for title in waiting:
        yield {"title": title, "why": why or "its process ended before it"}


def broken(title: str, why: str) -> Row:
    """The row of a cell that could not be measured."""
    return {
        "title": title,
        "op": "",
        "direction": "",
        "dtype": "",
        "axes": {},
        "right": False,
        "error": why,
    }


def run(command: Sequence[str], end: float | None) -> Iterator[dict[str, Any]]:
    """The events of a measuring process; the last one says `why` it came to no good end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield from follow(process, end)
    finally:
        stop(process)


def follow(process: subprocess.Popen[str], end: float | None) -> Iterator[dict[str, Any]]:
    """The events as they come, until the process ends, hangs, or the time is over."""
    patience = STARTING
    arriving = _lines(process)
    while True:
        left = math.inf if end is None else end + OVERTIME - time.monotonic()
        try:
            event = arriving.get(timeout=max(min(patience, left), 0.0))
        except queue.Empty:
            stuck = f"stuck: stopped after {patience:.0f} s without an answer"
            yield {"why": stuck if patience < left else TIME_IS_OVER}
            return
        if event is None:
            code = process.wait()
            if code:
                yield {"why": died(code)}
            return
        if "cell" in event and end is not None and time.monotonic() > end:
            yield {"why": TIME_IS_OVER}
            return
        patience = event["limit"] if "cell" in event else STARTING
        yield event


def _lines(process: subprocess.Popen[str]) -> queue.Queue[dict[str, Any] | None]:
    """The lines of the process as they come, then None."""
    arriving: queue.Queue[dict[str, Any] | None] = queue.Queue()
    assert process.stdout is not None

    def read() -> None:
        for line in process.stdout:
            arriving.put(json.loads(line))
        arriving.put(None)

    threading.Thread(target=read, daemon=True).start()
    return arriving


def stop(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def died(code: int) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def child_environment() -> dict[str, str]:
    """Ours, the checkout first on the path, and nothing that would choose a backend."""
    chosen = {k: v for k, v in os.environ.items() if k not in BACKEND_VARIABLES}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return chosen | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
