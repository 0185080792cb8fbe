"""An engine that steps by itself, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from typing import Any

from fastattn.generation.engine import Engine
from fastattn.generation.request import Request

log = logging.getLogger(__name__)


class Background:
    """Steps an engine in a thread while there are requests, within ``with``.

        with Background(engine) as running:
            request = running.submit(prompt, max_new_tokens=50, on_token=print)

    If the model fails, the requests of that moment end with "error"; so do those that are left at
    the end of ``with``.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._work = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="fastattn engine", daemon=True)

    def submit(self, prompt_ids: Any, **arguments: Any) -> Request:
        """`Engine.submit`, from any thread."""
        request = self.engine.submit(prompt_ids, **arguments)
        self._work.set()
        return request

    def cancel(self, request: Request) -> None:
        """`Request.cancel`, from any thread."""
        request.cancel()
        self._work.set()

    def __enter__(self) -> Background:
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
            except Exception as error:
                log.exception("a step of the engine failed")
                self.engine.fail(error)
        self.engine.fail(RuntimeError("the engine has been stopped"))
