"""The web application: starlette's routes around an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fastattn.cli.answers import TextStream
from fastattn.cli.serve import guard
from fastattn.cli.serve.protocol import RequestError, Responses, Task, read
from fastattn.files import parsed_json
from fastattn.generation import Background, Request

Receive = Callable[[], Coroutine[Any, Any, Any]]

LARGEST_BODY = 2**20  # bytes; a prompt of 128k tokens has fewer
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Gone(Exception):
    """The client went away."""


@dataclasses.dataclass
class Admission:
    """How much is taken on at once.

    Attributes:
        most: choices of all clients together that run or wait; what is beyond them is refused.
        new_tokens: the most of one choice; None: as many as there is room for.
        now: choices that run or wait.
    """

    most: int = 256
    new_tokens: int | None = None
    now: int = 0

    def check(self, task: Task) -> None:
        """Raises RequestError if the task is too much, or too much now."""
        if self.now + task.n * len(task.prompts) > self.most:
            raise RequestError.too_many(f"{self.now} choices run or wait already", 1)
        asked, most = task.max_tokens, self.new_tokens
        if asked is not None and most is not None and asked > most:
            raise RequestError(f"max_tokens may be at most {most} here; got {asked}", "max_tokens")


def make_app(
    engine: Background,
    tokenizer: Any,
    name: str,
    hosts: Sequence[str] | None,
    *,
    key: str | None = None,
    rate: int | None = None,
    admission: Admission | None = None,
) -> Starlette:
    """
    Args:
        engine: runs.
        tokenizer: transformers'.
        name: of the model.
        hosts, key, rate: see `guard.Guard`.
        admission: None: with its defaults.
    """
    page = (resources.files("fastattn.cli.serve") / "chat.html").read_text(encoding="utf-8")
    model = {"id": name, "object": "model", "created": 0, "owned_by": "fastattn"}
    tokenizing = asyncio.Lock()
    admitted = admission or Admission()

    async def chat_page(_: HttpRequest) -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    async def models(_: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(http: HttpRequest) -> Response:
        body = await _json(http)
        chat = http.url.path.startswith("/v1/chat")
        async with tokenizing:  # a long text takes a while, in which others are answered
            task = await asyncio.to_thread(read, body, tokenizer, chat)
        if body.get("model") not in (None, name):
            message = f"there is no model {body['model']!r}; this server has {name!r}"
            raise RequestError(message, "model", 404, "model_not_found")
        running, responses = Running(engine, task, tokenizer, admitted), Responses(task, name)
        if task.stream:
            return EventStream(running, _events(running, responses, task.usage))
        try:
            return await _while_connected(http.receive, _whole(running, responses))
        except Gone:
            return Response(status_code=499)  # which nobody reads
        finally:
            running.cancel()

    return Starlette(
        routes=[
            Route("/", chat_page),
            Route("/v1/models", models),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        middleware=[Middleware(guard.Guard, hosts=hosts, key=key, rate=rate)],
        exception_handlers={RequestError: _refused, HTTPException: _refused, Exception: _refused},
    )


async def _refused(_: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # starlette's: no such path or method
        error = RequestError(error.detail, status=error.status_code)
    elif not isinstance(error, RequestError):
        error = RequestError(f"{type(error).__name__}: {error}", status=500)
    return guard.error_response(error)


async def _json(http: HttpRequest) -> Any:
    # A page of another site may send a form or a text unasked, but not this.
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the body must be JSON, with the header Content-Type: application/json")
    try:
        return parsed_json(await asyncio.wait_for(_body(http), guard.PATIENCE))
    except asyncio.TimeoutError as error:
        message = f"the body did not come within {guard.PATIENCE:g} s"
        raise RequestError(message, status=408) from error
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from error


async def _body(http: HttpRequest) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise RequestError(f"the body has more than {LARGEST_BODY} bytes", status=413)
    return bytes(body)


class Running:
    """A task's requests to the engine, one a choice, and their text as it comes."""

    def __init__(
        self, engine: Background, task: Task, tokenizer: Any, admission: Admission
    ) -> None:
        """Raises RequestError if one of them does not fit; then none runs."""
        admission.check(task)
        self._engine, self._admission = engine, admission
        self._events: asyncio.Queue[tuple[int, int | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.requests: list[Request] = []
        try:
            for prompt in task.prompts:
                for _ in range(task.n):
                    self.requests.append(self._submit(task, prompt, len(self.requests)))
        except (TypeError, ValueError) as error:
            self.cancel()
            long = "_positions" in str(error) or "pages" in str(error)
            code = "context_length_exceeded" if long else None
            param = "messages" if task.chat else "prompt"
            raise RequestError(str(error), param, code=code) from error
        self._texts = [TextStream(tokenizer, task.stop) for _ in self.requests]

    def _submit(self, task: Task, prompt: list[int], index: int) -> Request:
        def tell(token: int | None) -> None:  # in the engine's thread
            self._loop.call_soon_threadsafe(heard, token)

        def heard(token: int | None) -> None:
            self._events.put_nowait((index, token))
            self._admission.now -= token is None

        longest = self._engine.engine.longest - len(prompt)
        room = max(min(longest, self._admission.new_tokens or longest), 1)
        request = self._engine.submit(
            prompt,
            max_new_tokens=room if task.max_tokens is None else task.max_tokens,
            sampling=task.sampling,
            seed=None if task.seed is None else task.seed + index,
            on_token=tell,
            on_finish=lambda _: tell(None),
        )
        self._admission.now += 1
        return request

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, its next text, None or why it ended: "stop" or "length") until all have ended.

        Raises RequestError if one fails.
        """
        unfinished = len(self.requests)
        while unfinished:
            index, token = await self._events.get()
            request, text = self.requests[index], self._texts[index]
            if token is not None:
                yield index, text.push(token), None
                if text.stopped:
                    self._engine.cancel(request)
                continue
            if request.error is not None:
                raise RequestError(str(request.error), status=500)
            unfinished -= 1
            last = text.end()
            yield index, last, "stop" if text.stopped else str(request.finish_reason)

    def cancel(self) -> None:
        """End what has not ended."""
        for request in self.requests:
            self._engine.cancel(request)

    def usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.requests)
        new = sum(len(request.tokens) for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _whole(running: Running, responses: Responses) -> Response:
    texts, reasons = [""] * len(running.requests), [""] * len(running.requests)
    async for index, text, reason in running.pieces():
        texts[index] += text
        reasons[index] = reason or ""
    choices = map(responses.choice, range(len(texts)), texts, reasons)
    return JSONResponse(responses.body(list(choices), usage=running.usage()))


async def _events(running: Running, responses: Responses, usage: bool) -> AsyncIterator[str]:
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
            await _while_connected(receive, self.stream_response(send))
        except (Gone, OSError):
            pass
        finally:
            self._running.cancel()


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
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
