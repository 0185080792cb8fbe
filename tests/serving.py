"""An application of `fastattn serve` on a real socket of this machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from fastattn.cli.serve.guard import Impatient


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """The port, as long as the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = {"http": Impatient, "ws": "none", "log_level": "critical"}
        server = uvicorn.Server(uvicorn.Config(app, **settings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def request(
    port: int, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of a response; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"Content-Type": "application/json"} if body is not None else {}
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request(method, path, data, {**given, **headers})
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read().decode()
