"""Answers to a client: the whole text, or events as it comes, as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from fastattn.cli.serve.protocol import RequestError, Responses
from fastattn.cli.serve.running import Running

Receive = Callable[[], Coroutine[Any, Any, Any]]


class Gone(Exception):
    """The client went away."""


async def whole_of(running: Running, responses: Responses) -> Response:
    """One body with all choices, when the last has ended."""
    texts, reasons = [""] * len(running.requests), [""] * len(running.requests)
    async for index, text, reason in running.pieces():
        texts[index] += text
        reasons[index] = reason or ""
    choices = map(responses.choice, range(len(texts)), texts, reasons)
    return JSONResponse(responses.body(list(choices), usage=running.usage()))


async def events_of(running: Running, responses: Responses, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a piece each, then [DONE]."""
    try:
        for index in range(len(running.requests)):
            yield _event(responses.body([responses.piece(index, None)]))
        async for index, text, reason in running.pieces():
            if text:
                yield _event(responses.body([responses.piece(index, text)]))
            if reason is not None:
                yield _event(responses.body([responses.piece(index, None, reason)]))
        if usage:
            yield _event(responses.body([], usage=running.usage()))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class EventStream(StreamingResponse):
    """Events to a client, as long as it is there; after that its requests are cancelled."""

    def __init__(self, running: Running, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._running = running

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        try:
            await while_connected(receive, self.stream_response(send))
        except (Gone, OSError):
            pass
        finally:
            self._running.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of ``work``, which is cancelled if the client goes away: raises Gone."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
