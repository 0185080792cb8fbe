"""Who may call `fastattn serve`, how much is taken on, and how slow a client may be."""

from __future__ import annotations

import importlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastattn import GPT
from fastattn.cli import main
from fastattn.generation import Background, Engine

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
serving = importlib.import_module("serving")

from fastattn.cli.serve import guard  # noqa: E402  # needs the two packages
from fastattn.cli.serve.app import make_app  # noqa: E402
from fastattn.cli.serve.protocol import RequestError  # noqa: E402
from fastattn.cli.serve.running import Admission  # noqa: E402

KEY = "0123456789abcdefXYZ"
BODY = {"prompt": "the fox", "max_tokens": 4, "temperature": 0}


class Served:
    """A server with a key and limits, whose engine can be held."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(GPT.from_pretrained(folder), pages=40, max_batch=4)
        self.admission = Admission(most=6, new_tokens=50)
        self.port = 0
        self.free = threading.Event()
        self.free.set()
        step = self.engine.step

        def held() -> bool:
            self.free.wait(20)
            return step()

        self.engine.step = held  # type: ignore[method-assign]

    def ask(self, body: Any = BODY, key: str | None = KEY, **headers: str) -> Any:
        given = {} if key is None else {"Authorization": f"Bearer {key}"}
        path = "/v1/completions"
        return serving.request(self.port, "POST", path, body, **{**given, **headers})


@pytest.fixture(scope="module")
def served(chat_folder: Path) -> Iterator[Served]:
    import transformers

    served = Served(chat_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_folder)
    with Background(served.engine) as running:
        hosts = ["127.0.0.1", "[::1]"]
        app = make_app(running, tokenizer, "small", hosts, key=KEY, admission=served.admission)
        with serving.listening(app) as served.port:
            yield served


@pytest.mark.parametrize("key", [None, "", KEY[:-1], KEY + "0", KEY.lower(), "ö" * 19])
def test_without_the_key_nothing_is_served(served: Served, key: str | None) -> None:
    status, headers, text = served.ask(key=key)
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert json.loads(text)["error"]["code"] == "invalid_api_key" and KEY not in text
    assert serving.request(served.port, "GET", "/v1/models")[0] == 401
    assert serving.request(served.port, "GET", "/v1/nothing")[0] == 401
    assert served.ask(key=None, Authorization=f"Basic {KEY}")[0] == 401


def test_with_the_key_all_is_served(served: Served) -> None:
    assert served.ask()[0] == 200
    status, headers, page = serving.request(served.port, "GET", "/")
    assert status == 200 and KEY not in page  # the page asks for the key
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_the_page_makes_no_html_of_texts() -> None:
    page = Path(guard.__file__).with_name("chat.html").read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStor", page
    )


@pytest.mark.parametrize(
    ("host", "known"),
    [("127.0.0.1", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("evil.example", False),
     ("127.0.0.1.evil.example", False), ("evil.example:127.0.0.1", False), ("", False),
     ("[::1", False), ("[::1].evil.example", False)],
)  # fmt: skip
def test_names_of_the_server(served: Served, host: str, known: bool) -> None:
    """A page of another site sends that site's name, whatever address the name points to."""
    assert served.ask(Host=host)[0] == (200 if known else 400)


def test_another_host_takes_a_key(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_API_KEY", raising=False)
    command, further = (
        ["serve", "no/such/folder", "--port", "0", "--host"],
        "there is no folder no/",
    )
    refused([*command, "0.0.0.0"], "set FASTATTN_API_KEY to a key")
    for here in ("127.0.0.1", "127.0.0.2", "localhost"):
        refused([*command, here], further)
    refused([*command, "0.0.0.0", "--no-key"], further)
    monkeypatch.setenv("FASTATTN_API_KEY", KEY)
    refused([*command, "0.0.0.0"], further)


@pytest.mark.parametrize("key", ["short", "with a space in it", "ключ" * 8, "a" * 20 + "\n"])
def test_a_poor_key_is_refused_and_not_shown(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no/such/folder", "--port", "0", "--api-key", key]) == 1
    output = capsys.readouterr().err
    assert "at least 16 printable ASCII" in output and key.strip() not in output


@pytest.mark.parametrize("option", ["--rate", "--max-choices", "--max-new-tokens"])
def test_a_limit_of_nothing(option: str, refused: Any) -> None:
    refused(["serve", "no/such/folder", option, "0"], f"{option} must be at least 1; got 0")


class TestRate:
    """Requests a minute of an address, by a clock that the test turns."""

    def _guard(self, rate: int) -> None:
        self.now = 0.0
        self.guard = guard.Guard(None, None, rate=rate, clock=lambda: self.now)

    def _refused(self, client: str = "10.0.0.1", path: str = "/v1/models") -> int | None:
        """After how many seconds to try again; None if the request may pass."""
        scope = {"type": "http", "path": path, "headers": [], "client": (client, 1)}
        try:
            self.guard._check(scope)
        except RequestError as error:
            assert error.status == 429 and error.headers is not None
            return int(error.headers["Retry-After"])
        return None

    def test_of_each_client(self) -> None:
        self._guard(30)
        assert [self._refused() for _ in range(30)] == [None] * 30
        assert self._refused() == 2 and self._refused("10.0.0.2") is None
        assert self._refused(path="/") is None
        self.now = 1.9
        assert self._refused() == 1
        self.now = 2.1  # refusals cost nothing
        assert self._refused() is None and self._refused() == 2
        self.now = 10_000
        assert [self._refused() for _ in range(31)] == [None] * 30 + [2]

    def test_the_table_of_clients_is_bounded(self) -> None:
        self._guard(1)
        for number in range(guard.MOST_CLIENTS + 100):
            assert self._refused(f"client {number}") is None
        assert len(self.guard._left) == guard.MOST_CLIENTS
        assert self._refused(f"client {number}") == 60


def test_choices_beyond_the_limit_wait_outside(served: Served) -> None:
    """429 at once, and room again when the others have ended."""
    served.free.clear()
    got: list[int] = []
    body = {**BODY, "n": 5}
    asking = threading.Thread(target=lambda: got.append(served.ask(body)[0]))
    asking.start()
    deadline = time.monotonic() + 20
    while served.admission.now < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        status, headers, text = served.ask({**BODY, "n": 2})
        assert status == 429 and headers["retry-after"] == "1"
        assert "5 choices run or wait" in json.loads(text)["error"]["message"]
    finally:
        served.free.set()
        asking.join(20)
    assert got == [200]
    assert served.ask({**BODY, "n": 6})[0] == 200
    assert served.ask({**BODY, "prompt": [1, 10**6]})[0] == 400
    assert served.admission.now == 0


def test_limits_of_one_request(served: Served) -> None:
    status, _, text = served.ask({**BODY, "prompt": ["a"] * 33, "n": 2})
    assert status == 400 and "more than 64 choices" in text
    status, _, text = served.ask({**BODY, "max_tokens": 51})
    assert status == 400 and json.loads(text)["error"]["param"] == "max_tokens"
    status, _, text = serving.request(
        served.port, "POST", "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "fox"}], "temperature": 0},
        Authorization=f"Bearer {KEY}",
    )  # fmt: skip
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] <= 50


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "model": "\\udfff"}',
        b'{"prompt": "a", "stop": ["\\ud800"]}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 70 + b"1" + b"]" * 70 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        '{"prompt": "a"}'.encode("utf-16"),
    ],
)
def test_json_that_two_readers_may_read_in_two_ways(served: Served, body: bytes) -> None:
    assert served.ask(body)[0] == 400
    assert served.ask()[0] == 200


def _until_closed(connection: socket.socket) -> bytes:
    got = b""
    try:
        while piece := connection.recv(4096):
            got += piece
    except ConnectionError:
        pass
    return got


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]
)
def test_a_head_that_does_not_come(
    served: Served, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not keep a connection; nor does a request before it."""
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(sent)
        with pytest.raises(OSError):
            while time.monotonic() < start + 10:
                connection.sendall(b"A")
                time.sleep(0.05)
    assert time.monotonic() - start < 5


def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b"408" in connection.recv(4096).partition(b"\r\n")[0]


def test_a_head_without_an_end(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 2**17)
        assert b" 400 " in _until_closed(connection).partition(b"\r\n")[0]


def test_clients_that_leave_at_any_point(served: Served) -> None:
    whole = json.dumps({**BODY, "stream": True, "max_tokens": 40}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(whole)}\r\n\r\n"
    ).encode()
    for count in range(1, len(head + whole) + 1, 17):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall((head + whole)[:count])
    deadline = time.monotonic() + 20
    while served.admission.now and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.admission.now == 0 and served.ask()[0] == 200
