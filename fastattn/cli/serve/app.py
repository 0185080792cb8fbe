"""The web application: starlette's routes around an engine.

A request goes through these rooms:

    guard.py      who may call, how often and how slowly
    app.py        its path, and its body as JSON
    protocol.py   the body, checked: a task
    running.py    the task's choices in the engine, if there is room for them
    answering.py  their text, whole or as events
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fastattn.cli.serve import guard
from fastattn.cli.serve.answering import EventStream, Gone, events_of, while_connected, whole_of
from fastattn.cli.serve.protocol import RequestError, Responses, read
from fastattn.cli.serve.running import Admission, Running
from fastattn.files import parsed_json
from fastattn.generation import Background

LARGEST_BODY = 2**20  # bytes; a prompt of 128k tokens has fewer
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


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
            return EventStream(running, events_of(running, responses, task.usage))
        try:
            return await while_connected(http.receive, whole_of(running, responses))
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
