"""`fastattn serve` and what strangers send: bodies, heads, bytes.

Every answer is a documented one, and after all of them the server answers as before: with the same
text, all its pages and no request left.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutations
import pytest

from fastattn import GPT, GPTConfig
from fastattn.generation import Background, Engine
from fastattn.training import Tokenizer

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
serving = importlib.import_module("serving")

from fastattn.cli.serve import guard  # noqa: E402  # needs the two packages
from fastattn.cli.serve.app import make_app  # noqa: E402  # needs the two packages
from fastattn.cli.serve.protocol import SAMPLING  # noqa: E402
from fastattn.cli.serve.running import Admission  # noqa: E402

DRAWS = [40, pytest.param(150, marks=pytest.mark.long)]
REFUSALS = {400, 404, 405, 408, 411, 413, 429, 431}
COMPLETION = {
    "prompt": ["the fox", "今天"], "max_tokens": 3, "n": 2, "seed": 7, "temperature": 0.5, "top_p": 0.9,
    "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "stop": ["x"], "stream": False, "user": "me",
    "stream_options": {"include_usage": True}, "model": "small",
}  # fmt: skip
CHAT = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "fox?"}]},
    ],
    "max_completion_tokens": 3, "temperature": 0,
}  # fmt: skip


class Served:
    def __init__(self, folder: Path) -> None:
        self.engine = Engine(GPT.from_pretrained(folder), pages=20, max_batch=4)
        self.admission = Admission()
        self.port = 0

    def ask(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        status, _, text = serving.request(self.port, "POST", f"/v1/{path}", body, **headers)
        return status, text

    def text(self) -> str:
        """A greedy answer, which never changes."""
        body = {"prompt": "the quick", "max_tokens": 8, "temperature": 0}
        status, text = self.ask("completions", body)
        assert status == 200, text
        return json.loads(text)["choices"][0]["text"]

    def is_idle(self) -> bool:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.engine.free_pages == self.engine.pages and not self.admission.now:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import transformers

    folder = tmp_path_factory.mktemp("served")
    tokenizer = Tokenizer.train(["the quick brown fox 今天天气很好 " * 20], vocab_size=300)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.end_of_text,
        )
    ).save_pretrained(folder)
    tokenizer.save(folder)
    served = Served(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with Background(served.engine) as running:
        app = make_app(running, theirs, "small", ["127.0.0.1"], admission=served.admission)
        with serving.listening(app) as served.port:
            yield served


@pytest.fixture(autouse=True)
def _as_before(served: Served) -> Iterator[None]:
    """After each test the server is as it was."""
    expected = served.text()
    yield
    assert served.text() == expected and served.is_idle()


def check(path: str, status: int, text: str) -> None:
    if status == 200:
        assert text.startswith("data: ") or json.loads(text)["choices"]
    else:
        assert status in REFUSALS, (status, text)
        error = json.loads(text)["error"]
        assert error["message"] and error["type"] == "invalid_request_error", path


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize(
    ("path", "whole"), [("completions", COMPLETION), ("chat/completions", CHAT)]
)
def test_bodies(served: Served, path: str, whole: dict[str, Any], draws: int) -> None:
    @mutations.drawn(mutations.changed_json(whole), draws)
    def draw(value: Any) -> None:
        check(path, *served.ask(path, mutations.text_of(value)))

    draw()


def test_every_number_of_every_parameter(served: Served) -> None:
    """An engine's step that fails ends the requests of all: no number may make one fail."""
    small = {"prompt": "fox", "max_tokens": 2, "temperature": 1.0, "seed": 1}
    for name, value in itertools.product((*SAMPLING, "max_tokens", "n", "seed"), mutations.NUMBERS):
        path, body = "completions", {**small, name: value}
        check(path, *served.ask(path, mutations.text_of(body)))


@pytest.mark.parametrize("draws", DRAWS)
def test_bytes_of_bodies(served: Served, draws: int) -> None:
    @mutations.drawn(mutations.changed(json.dumps(COMPLETION, ensure_ascii=False).encode()), draws)
    def draw(content: bytes) -> None:
        check("completions", *served.ask("completions", content))

    draw()


def _exchange(port: int, content: bytes) -> bytes:
    """What comes back for some bytes, until the server has enough of waiting for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(content)
            got = b""
            while piece := connection.recv(4096):
                got += piece
        except ConnectionError:  # closed before all was sent
            return b""
        return got


@pytest.mark.parametrize("draws", DRAWS)
def test_bytes_of_requests(served: Served, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads too: any is answered as HTTP, or the connection is closed."""
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    body = json.dumps({"prompt": "fox", "max_tokens": 2}).encode()
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
    )

    @mutations.drawn(mutations.changed(whole), draws)
    def draw(content: bytes) -> None:
        answer = _exchange(served.port, content)
        if answer:
            version, status, *_ = answer.split(b" ", 2)
            assert version == b"HTTP/1.1" and int(status) in {200, *REFUSALS, 501}, answer[:500]

    draw()
    monkeypatch.undo()
    assert _exchange(served.port, whole).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Content-Length : 5\r\n",
        b"X: a\0b\r\n",
    ],
)
def test_heads_that_two_servers_may_read_in_two_ways(
    served: Served, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request hidden in the first one is never answered."""
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    answer = _exchange(
        served.port,
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n" + hidden,
    )
    assert b" 200 " not in answer.partition(b"\r\n")[0] and b'"object":"list"' not in answer


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/../v1/models/../../app.py", "//etc/passwd",
     "/chat.html", "/static/../app.py", "/%00", "/v1/completions%0d%0aX:y", "/docs", "/openapi.json"],
)  # fmt: skip
def test_there_is_no_other_file(served: Served, path: str) -> None:
    status, _, text = serving.request(served.port, "GET", path)
    assert status in (400, 404, 405) and "root:" not in text and "import" not in text


def test_many_clients_with_bad_and_good_requests(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good one is answered while others send anything."""
    monkeypatch.setattr(guard, "PATIENCE", 3.0)
    chance = random.Random(0)
    got: list[int] = []

    def bad() -> None:
        for _ in range(10):
            _exchange(served.port, chance.randbytes(200) + b"\r\n\r\n")
            got.append(served.ask("completions", {"prompt": [chance.randint(0, 10**6)]})[0])

    threads = [threading.Thread(target=bad) for _ in range(4)]
    for thread in threads:
        thread.start()
    expected = served.text()
    for _ in range(10):
        assert served.text() == expected
    for thread in threads:
        thread.join(60)
    assert len(got) == 40 and set(got) <= {200, 400}


@pytest.mark.parametrize("draws", DRAWS[1:])
def test_memory_of_many_bad_requests(served: Served, draws: int) -> None:
    """Nothing is kept of a request that was refused."""

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    chance = random.Random(0)

    def load(count: int) -> None:
        for _ in range(count):
            # Longer than the model's positions, whatever n is.
            body = {"prompt": "x" * chance.randint(10**4, 10**5), "n": chance.randint(-5, 70)}
            assert served.ask("completions", body)[0] == 400

    load(draws // 3)
    before = resident()
    load(draws)
    assert resident() - before < 2**25
