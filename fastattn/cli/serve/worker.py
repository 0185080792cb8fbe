"""The thread that steps the engine."""

from __future__ import annotations

import logging
import threading
from typing import Any

from fastattn.generation import Engine, Request

log = logging.getLogger("uvicorn.error")


class Worker:
    """Steps an engine in a thread of its own while there are requests, within `with`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._work = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def submit(self, ids: list[int], **arguments: Any) -> Request:
        """`Engine.submit`, from any thread."""
        request = self.engine.submit(ids, **arguments)
        self._work.set()
        return request

    def cancel(self, request: Request) -> None:
        request.cancel()
        self._work.set()

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._work.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            self._work.wait()
            self._work.clear()
            try:
                while not self._ended and self.engine.step():
                    pass
            except Exception as error:  # of the model: its requests fail, the next ones may not
                log.exception("a step of the engine failed")
                self.engine.fail(error)
        self.engine.fail(RuntimeError("the server is going down"))
