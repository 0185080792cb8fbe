"""What stands between the sockets and the application: who may call, how often, and how slowly."""

from __future__ import annotations

import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastattn.cli.serve.protocol import RequestError

PATIENCE = 15.0  # seconds for the head of a request, and for its body
MOST_CLIENTS = 4096  # whose requests are counted


class Guard:
    """ASGI middleware that refuses a request by its head, before any of its body is read.

    Args:
        app: what it stands before.
        hosts: the names that the server may be called by, so that a page of another site cannot
            reach it by a name that it lets point here; None is any.
        key: which /v1 asks for as "Authorization: Bearer KEY"; None: it asks for none.
        rate: requests a minute to /v1 of each client's address; None: any number.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        app: Any,
        hosts: Sequence[str] | None,
        key: str | None = None,
        rate: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._hosts, self._rate, self._clock = app, hosts, rate, clock
        self._key = None if key is None else f"Bearer {key}".encode()
        # A client's address -> how many requests it may send now, and when that was so.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["type"] == "http":
                self._check(scope)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:
            raise RequestError(f"this server is not called {host[:80]!r}")
        if not scope["path"].startswith("/v1/"):
            return  # the page, which is the same for everyone
        given = headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            message = "this server asks for its key: Authorization: Bearer KEY"
            raise RequestError(
                message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        if self._rate is not None:
            self._count(str((scope.get("client") or [""])[0]), self._rate)

    def _count(self, client: str, rate: int) -> None:
        """Take one of a client's requests, of which it gets `rate` a minute, as many at once."""
        now = self._clock()
        left, since = self._left.pop(client, (float(rate), now))
        left = min(rate, left + (now - since) * rate / 60)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / rate)
            raise RequestError.too_many(f"more than {rate} requests a minute", wait)


def error_response(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


class Impatient(H11Protocol):
    """uvicorn's HTTP, which closes a connection whose next request's head takes too long.

    (uvicorn has a limit for a connection that has been used and is silent, and none for one that
    sends a byte now and then.)
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: Any = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(PATIENCE, self._expire)

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
