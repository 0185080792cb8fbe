"""`fastattn serve`: OpenAI's interface over real sockets."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastattn import GPT
from fastattn.generation import Background, Engine

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
serving = importlib.import_module("serving")

NAME = "small"
LONGEST = 81  # 5 pages of 16 tokens, and one more that is never read; the context has 96


class Served:
    """A server, its engine, and the model and tokenizer to compare with."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = GPT.from_pretrained(folder)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.engine = Engine(GPT.from_pretrained(folder), pages=5, page_size=16, max_batch=4)
        self.port = 0

    def request(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        return serving.request(self.port, method, path, body, **headers)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        status, _, text = self.request("POST", f"/v1/{path}", body)
        assert status == 200, text
        return json.loads(text)

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        status, headers, text = self.request("POST", f"/v1/{path}", {**body, "stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n")[:-1]]
        assert done == "[DONE]"
        return [json.loads(line) for line in lines]

    def new_ids(self, text: str | list[int], **arguments: Any) -> list[int]:
        ids = self.tokenizer(text)["input_ids"] if isinstance(text, str) else text
        return self.model.generate([ids], **arguments)[0, len(ids) :].tolist()

    def expected(self, text: str | list[int], **arguments: Any) -> str:
        new = self.new_ids(text, **arguments)
        return self.tokenizer.decode(new, skip_special_tokens=True)

    def idle(self) -> bool:
        """Whether all pages are free, within a while."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.engine.free_pages < self.engine.pages:
            time.sleep(0.01)
        return self.engine.free_pages == self.engine.pages


@pytest.fixture(scope="module")
def served(chat_folder: Path) -> Iterator[Served]:
    from fastattn.cli.serve.app import make_app

    served = Served(chat_folder)
    with Background(served.engine) as running:
        app = make_app(running, served.tokenizer, NAME, ["127.0.0.1"])
        with serving.listening(app) as served.port:
            yield served


GREEDY = {"temperature": 0}
QUESTION = [{"role": "user", "content": "天气?"}]
ASKED = "[user] 天气?\n[assistant] "


def test_completions(served: Served) -> None:
    got = served.post("completions", model=NAME, prompt="the fox", max_tokens=20, **GREEDY)
    assert got["object"] == "text_completion" and got["model"] == NAME and got["id"]
    (choice,) = got["choices"]
    assert choice["text"] == served.expected("the fox", max_new_tokens=20)
    new = served.new_ids("the fox", max_new_tokens=20)
    assert choice["finish_reason"] == ("length" if len(new) == 20 else "stop")
    prompt = len(served.tokenizer("the fox")["input_ids"])
    assert got["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": len(new), "total_tokens": prompt + len(new),
    }  # fmt: skip


def test_completions_of_several_prompts_and_choices(served: Served) -> None:
    prompts = ["the fox", "今天"]
    got = served.post("completions", prompt=prompts, n=2, seed=7, temperature=0.8, max_tokens=9)
    texts = [choice["text"] for choice in got["choices"]]
    settings = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 9}
    assert texts == [
        served.expected(prompts[index // 2], seed=7 + index, **settings) for index in range(4)
    ]
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3]
    ids = served.tokenizer(prompts)["input_ids"]
    same = served.post("completions", prompt=ids, n=2, seed=7, temperature=0.8, max_tokens=9)
    assert [choice["text"] for choice in same["choices"]] == texts
    one = served.post("completions", prompt=ids[1], **GREEDY)
    assert one["choices"][0]["text"] == served.expected(ids[1], max_new_tokens=16)


def test_chat(served: Served) -> None:
    got = served.post("chat/completions", messages=QUESTION, max_completion_tokens=20, **GREEDY)
    assert got["object"] == "chat.completion"
    message = got["choices"][0]["message"]
    expected = served.expected(ASKED, max_new_tokens=20)
    assert message == {"role": "assistant", "content": expected}
    parts = [{"type": "text", "text": "天"}, {"type": "text", "text": "气?"}]
    messages = [{"role": "user", "content": parts}]
    same = served.post("chat/completions", messages=messages, max_tokens=20, **GREEDY)
    assert same["choices"][0]["message"] == message


def test_a_chat_goes_on_to_the_end_of_the_pages(served: Served) -> None:
    got = served.post("chat/completions", messages=QUESTION, **GREEDY)
    asked = len(served.tokenizer(ASKED)["input_ids"])
    expected = served.new_ids(ASKED, max_new_tokens=LONGEST - asked)
    assert got["usage"]["completion_tokens"] == len(expected)


@pytest.mark.parametrize("usage", [False, True])
def test_streams(served: Served, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    events = served.events("completions", prompt="the fox", max_tokens=20, **GREEDY, **options)
    assert {event["object"] for event in events} == {"text_completion"}
    if usage:
        last = events.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    choices = [event["choices"][0] for event in events]
    expected = served.expected("the fox", max_new_tokens=20)
    assert "".join(choice["text"] for choice in choices) == expected
    assert [bool(choice["finish_reason"]) for choice in choices] == [False] * (len(choices) - 1) + [
        True
    ]

    events = served.events("chat/completions", messages=QUESTION, n=2, max_tokens=20, **GREEDY)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in range(2):
        choices = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant" and choices[-1]["delta"] == {}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == served.expected(ASKED, max_new_tokens=20)


@pytest.mark.parametrize("stream", [False, True])
def test_stop(served: Served, stream: bool) -> None:
    whole = served.expected("the fox", max_new_tokens=30)
    stop = whole[6:9]
    body = {"prompt": "the fox", "stop": ["§", stop], "max_tokens": 30, **GREEDY}
    if stream:
        choices = [event["choices"][0] for event in served.events("completions", **body)]
        text, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
    else:
        (choice,) = served.post("completions", **body)["choices"]
        text, reason = choice["text"], choice["finish_reason"]
    assert text == whole[: whole.index(stop)] and reason == "stop"
    assert served.idle()


def test_requests_at_once_get_what_each_gets_alone(served: Served) -> None:
    """More than there are pages for, some of which go away."""
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"prompt": f"fox {number}", "max_tokens": 25 + number, **GREEDY}
        if number % 4 == 3:
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
            headers = {"Content-Type": "application/json"}
            connection.request(
                "POST", "/v1/completions", json.dumps({**body, "stream": True}), headers
            )
            connection.getresponse().read(40)
            connection.close()
        elif number % 4 == 2:
            assert served.request("POST", "/v1/completions", {**body, "top_p": 7})[0] == 400
        elif number % 4 == 1:
            got[number] = "".join(
                event["choices"][0]["text"] for event in served.events("completions", **body)
            )
        else:
            got[number] = served.post("completions", **body)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(got) == [n for n in range(16) if n % 4 < 2]
    for number, text in got.items():
        assert text == served.expected(f"fox {number}", max_new_tokens=25 + number)
    assert served.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels(
    served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = served.engine.step

    def slow() -> bool:
        time.sleep(0.05)
        steps.append(1)
        return step()

    monkeypatch.setattr(served.engine, "step", slow)
    prompts = (f"fox {number}" for number in range(50))
    prompt = next(p for p in prompts if len(served.new_ids(p, max_new_tokens=60)) == 60)
    body = {"prompt": prompt, "max_tokens": 60, "stream": stream, **GREEDY}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    while len(steps) < 4:
        time.sleep(0.01)
    assert served.engine.free_pages < served.engine.pages
    connection.sock.close()
    connection.close()
    assert served.idle() and len(steps) < 40


LONG = "the fox " * 60


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("completions", b"{", 400, None, "the body is no JSON"),
        ("completions", b"[" * 100_000, 400, None, "the body is no JSON"),
        ("completions", [1], 400, None, "must be a JSON object"),
        ("completions", {}, 400, "prompt", "prompt is missing, or empty"),
        ("completions", {"prompt": 3}, 400, "prompt", "prompt must be a text or a list"),
        ("completions", {"prompt": []}, 400, "prompt", "missing, or empty"),
        ("completions", {"prompt": ""}, 400, "prompt", "missing, or empty"),
        ("completions", {"prompt": [1, 10**6]}, 400, "prompt", "from 0 to vocab_size"),
        ("completions", {"prompt": "x", "logprobs": 3}, 400, "logprobs", "unknown parameter 'logprobs'"),
        ("completions", {"prompt": "x", "messages": []}, 400, "messages", "unknown parameter"),
        ("completions", {"prompt": "x", "model": "gpt-9"}, 404, "model", "there is no model 'gpt-9'"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "prompt", "max_new_tokens must be at least"),
        ("completions", {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens", "must be an integer"),
        ("completions", {"prompt": "x", "max_tokens": True}, 400, "max_tokens", "must be an integer"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature", "positive"),
        ("completions", {"prompt": "x", "top_p": 2}, 400, "top_p", "top_p must be in"),
        ("completions", {"prompt": "x", "n": 1000}, 400, "n", "n must be from 1 to 64"),
        ("completions", {"prompt": "x", "seed": 2**70}, 400, "seed", "64-bit"),
        ("completions", {"prompt": "x", "stop": [""]}, 400, "stop", "none of them empty"),
        ("completions", {"prompt": "x", "stop": list("abcde")}, 400, "stop", "at most 4"),
        ("completions", {"prompt": "x", "stream": 1}, 400, "stream", "true or false"),
        ("completions", {"prompt": LONG}, 400, "prompt", "n_positions = 96"),
        ("completions", {"prompt": "x", "max_tokens": 90}, 400, "prompt", "6 pages of 16 tokens, and .* has 5"),
        ("completions", {"prompt": ["x", LONG]}, 400, "prompt", "n_positions = 96"),
        ("chat/completions", {}, 400, "messages", "messages is missing"),
        ("chat/completions", {"messages": []}, 400, "messages", "missing, or empty"),
        ("chat/completions", {"messages": ["x"]}, 400, "messages", "objects with a role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "content must be a text"),
        ("chat/completions", {"messages": [{"role": "judge", "content": "x"}]}, 400, "messages", "no role judge"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", 'type "text"'),
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, 400, "messages", "n_positions = 96"),
        ("nothing", {}, 404, None, "Not Found"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)  # fmt: skip
def test_bad_requests_get_openais_errors(
    served: Served, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    got, _, text = served.request("POST", f"/v1/{path}", body)
    error = json.loads(text)["error"]
    assert (got, error["param"]) == (status, param), text
    assert re.search(message, error["message"]) and error["type"] == "invalid_request_error"
    if "n_positions = 96" in message:
        assert error["code"] == "context_length_exceeded"
    assert served.idle()


def test_only_json_of_this_site(served: Served) -> None:
    """What a page of another site can send without asking is refused."""
    body = json.dumps({"prompt": "x"}).encode()
    status, _, text = served.request(
        "POST", "/v1/completions", body, **{"Content-Type": "text/plain"}
    )
    assert status == 400 and "Content-Type: application/json" in text
    status, _, _ = served.request("GET", "/v1/models", Host="evil.example")
    assert status == 400
    status, headers, _ = served.request("GET", "/v1/models", Origin="http://evil.example")
    assert status == 200 and "access-control-allow-origin" not in headers
    status, _, text = served.request("POST", "/v1/completions", b" " * (2**20 + 1))
    assert status == 413 and "bytes" in text


def test_a_model_that_fails_fails_its_requests_only(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "the fox", "max_tokens": 20, **GREEDY}
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.model, "features", lambda *_: 1 / 0)
        status, _, text = served.request("POST", "/v1/completions", body)
        assert status == 500 and json.loads(text)["error"]["message"] == "division by zero"
        _, _, text = served.request("POST", "/v1/completions", {**body, "stream": True})
        assert json.loads(text.split("\n\n")[-2][6:])["error"]["type"] == "server_error"
    assert served.post("completions", **body)["choices"][0]["text"] == served.expected(
        "the fox", max_new_tokens=20
    )


def test_models_and_page(served: Served) -> None:
    assert json.loads(served.request("GET", "/v1/models")[2])["data"][0]["id"] == NAME
    status, headers, page = served.request("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"""(src|href)=|https?://|url\(|@import""", page)  # nothing from elsewhere


def test_openais_client(served: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [NAME]
    expected = served.expected(ASKED, max_new_tokens=20)
    ask = {"model": NAME, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    assert client.chat.completions.create(**ask).choices[0].message.content == expected
    stream = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    got = client.completions.create(
        model=NAME, prompt="the fox", max_tokens=9, seed=1, frequency_penalty=1.5,
        extra_body={"top_k": 5},
    )  # fmt: skip
    assert got.choices[0].text == served.expected(
        "the fox", max_new_tokens=9, do_sample=True, top_k=5, seed=1, frequency_penalty=1.5
    )
    with pytest.raises(openai.BadRequestError, match="unknown parameter 'logit_bias'"):
        client.chat.completions.create(**ask, logit_bias={"1": 5})
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(**{**ask, "model": "gpt-9"})


def test_a_port_in_use_is_said_before_the_model_is_read(served: Served, refused: Any) -> None:
    port = served.port
    message = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    refused(["serve", "no/such/folder", "--port", str(port)], message)
    refused(["serve", "no/such/folder", "--port", "0"], "there is no folder no/such/folder")


@pytest.mark.long
def test_the_command(chat_folder: Path) -> None:
    """In a process of its own, until Ctrl-C."""
    command = [sys.executable, "-m", "fastattn", "serve", str(chat_folder), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
    assert found is not None, process.stderr.read()
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("GET", "/v1/models")
    assert chat_folder.name in connection.getresponse().read().decode()
    process.send_signal(2)
    assert process.wait(20) in (0, 130) and "Traceback" not in process.stderr.read()


class Browser:
    """Chromium without a window, by its DevTools protocol over two pipes."""

    def __init__(self, program: str, profile: Path) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # The protocol is at the descriptors 3 and 4.
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *flags, f"--user-data-dir={profile}", "--window-size=900,700"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: dict[str, str] = {}
        self._count, self._rest = 0, b""

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._in, 1 << 20)
            answer, _, self._rest = self._rest.partition(b"\0")
            if (found := json.loads(answer)).get("id") == self._count:
                return found["result"]

    def open(self, url: str) -> None:
        target = self.send("Target.createTarget", url=url)["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def evaluate(self, script: str) -> Any:
        got = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        return got["result"].get("value")

    def wait(self, script: str) -> None:
        deadline = time.monotonic() + 30
        while not self.evaluate(script):
            assert time.monotonic() < deadline, f"{script} did not come true"
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)


@pytest.mark.long
def test_the_page_in_a_browser(served: Served, tmp_path: Path) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium was found")
    browser = Browser(program, tmp_path / "profile")

    def ask(text: str) -> list[str]:
        browser.evaluate(
            f"element('text').value = {json.dumps(text)}; element('form').requestSubmit(); 1"
        )
        browser.wait("!running")
        articles = "[...document.querySelectorAll('article')].map((a) => a.textContent)"
        return browser.evaluate(articles)

    with contextlib.closing(browser):
        browser.open(f"http://127.0.0.1:{served.port}/")
        browser.wait(f"document.title === {json.dumps(NAME)}")
        question, answer = ask("天气?")
        assert question == "天气?" and answer
        evil = "<img src=x onerror='document.title=1'>"
        assert ask(evil)[2] == evil  # as text
        for _ in range(4):  # beyond the context: the oldest turns are dropped
            shown = ask("fox?")
        assert len(shown) == 12 and not browser.evaluate("document.querySelector('.error')")
        assert browser.evaluate("messages.length") < 12
        assert browser.evaluate("document.title") == NAME
        picture = base64.b64decode(browser.send("Page.captureScreenshot")["data"])
        (tmp_path / "page.png").write_bytes(picture)
        assert ask("x" * 200)[-1].startswith("prompt_ids has")
        assert len(ask("fox?")) == 17 and ask("fox?")[-1]
    assert served.idle()
