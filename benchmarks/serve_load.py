"""`fastattn serve` under load: is every answer right, and does its memory stay as it is?

    python benchmarks/serve_load.py                             64 clients, 10 minutes
    python benchmarks/serve_load.py --clients 8 --minutes 0.3
    python benchmarks/serve_load.py --minutes 3 --kill          killed in the middle, started again

The server has a tiny random model that the script writes, and listens on this machine only. Clients
ask as fast as they are answered: streams and whole answers, completions and chats, of random
lengths; one in ten goes away in the middle. Greedy answers are compared with those that the idle
server gave. With --kill the server gets SIGKILL half way; clients then ask again until they are
answered.

Exit code: 0 no request failed and memory grew by less than 5% after the warm-up, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  # the code beside this script is measured
import torch

from fastattn import GPT, GPTConfig
from fastattn.training import Tokenizer

WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "今天", "天气", "很好",
)  # fmt: skip
CONTEXT = 256
CASES = 200
WARM_UP = 0.2  # of the time that a process of the server lives
MOST_GROWTH = 0.05
PATIENCE = 60.0  # seconds for an answer, and for a server that was killed to be there again
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@dataclasses.dataclass
class Case:
    """A greedy request, and the answer of an idle server."""

    path: str
    body: dict[str, Any]
    answer: str = ""


@dataclasses.dataclass
class Record:
    """What the clients saw. Lists of seconds; lists are appended to by any thread."""

    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    cancelled: list[None] = dataclasses.field(default_factory=list)
    again: list[str] = dataclasses.field(default_factory=list)


class Server:
    """`fastattn serve` in a process of its own, always on the same port."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._folder, self._log = folder, log
        self.kills = 0
        self.start()

    def start(self) -> None:
        """Return when it listens."""
        command = [sys.executable, "-m", "fastattn", "serve", str(self._folder), "--pages", "512"]
        root = str(Path(__file__).resolve().parents[1])
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=root,
                env={**os.environ, "PYTHONPATH": root},
            )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the server did not start: {self._log.read_text()[-2000:]}")
        self.memory: list[int] = []

    def sample(self) -> None:
        """Note the bytes that its process has in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        if found is not None:
            self.memory.append(int(found[1]) * 1024)

    def kill(self) -> None:
        self.kills += 1
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def write_model(folder: Path) -> None:
    """A chat model with random weights and a tokenizer of the words."""
    tokenizer = Tokenizer.train([" ".join(WORDS) * 20], vocab_size=300)
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.end_of_text,
    )  # fmt: skip
    GPT(config).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save(folder)


def make_cases(count: int, chance: random.Random) -> list[Case]:
    cases = []
    for number in range(count):
        text = f"{number} " + " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
        body: dict[str, Any] = {"temperature": 0, "max_tokens": chance.randint(1, 80)}
        if number % 2:
            cases.append(Case("completions", {**body, "prompt": text}))
        else:
            messages = [{"role": "user", "content": text}]
            cases.append(Case("chat/completions", {**body, "messages": messages}))
    return cases


def ask(port: int, case: Case, stream: bool, leave_after: int | None = None) -> Iterator[str]:
    """The pieces of an answer; the connection is closed after ``leave_after`` of them.

    Raises OSError or HTTPException if it breaks off, ValueError for an error of the server.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        body = json.dumps({**case.body, "stream": stream})
        connection.request("POST", f"/v1/{case.path}", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(300)!r}")
        if not stream:
            (choice,) = json.loads(response.read())["choices"]
            yield choice["text"] if "text" in choice else choice["message"]["content"]
            return
        count = 0
        while line := response.readline():
            if line == b"data: [DONE]\n":
                return
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(f"in the stream: {event['error']}")
            (choice,) = event["choices"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if text:
                yield text
            count += 1
            if count == leave_after:
                return
        raise http.client.IncompleteRead(b"")


def client(
    server: Server, cases: Sequence[Case], end: float, record: Record, chance: random.Random
) -> None:
    """Ask until `end`."""
    while time.monotonic() < end:
        case, kind = chance.choice(cases), chance.random()
        if kind < 0.1:
            with contextlib.suppress(OSError, http.client.HTTPException):
                list(ask(server.port, case, True, leave_after=chance.randint(1, 5)))
            record.cancelled.append(None)
            continue
        patient_until = time.monotonic() + PATIENCE
        while not _answered(server, case, kind < 0.55, record):
            if time.monotonic() > patient_until:
                record.failures.append("no answer came after the server was started again")
                break
            time.sleep(0.2)


def _answered(server: Server, case: Case, stream: bool, record: Record) -> bool:
    """Whether there is nothing more to do: an answer came, or a failure was noted."""
    start, kills, text, first = time.monotonic(), server.kills, "", None
    try:
        for piece in ask(server.port, case, stream):
            first = first or time.monotonic() - start
            text += piece
    except (OSError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}"
        # One that breaks off or is refused around a kill is asked again.
        if server.kills == kills == 0:
            record.failures.append(reason)
            return True
        record.again.append(reason)
        return False
    except ValueError as error:
        record.failures.append(str(error))
        return True
    if text != case.answer:
        record.failures.append(f"{case.body}: {text!r} is not {case.answer!r}")
        return True
    record.whole.append(time.monotonic() - start)
    if stream and first is not None:
        record.first.append(first)
    return True


def run(server: Server, clients: int, seconds: float, kill: bool, seed: int) -> Record:
    """Load the server, and note its memory each half a second."""
    cases = make_cases(CASES, random.Random(seed))
    for case in cases:
        case.answer = "".join(ask(server.port, case, stream=False))
    record, begin = Record(), time.monotonic()
    end = begin + seconds
    threads = [
        threading.Thread(
            target=client, args=(server, cases, end, record, random.Random(seed + 1 + number))
        )
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        if kill and time.monotonic() > begin + seconds / 2:
            kill = False
            server.kill()
            time.sleep(1)
            server.start()
        server.sample()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    return record


def growth(memory: Sequence[int]) -> float:
    """How much larger the last tenth of the samples is than the tenth after the warm-up."""
    tenth, warm = max(len(memory) // 10, 1), int(len(memory) * WARM_UP)
    before = statistics.median(memory[warm : warm + tenth])
    return statistics.median(memory[-tenth:]) / before - 1


def report(record: Record, server: Server) -> bool:
    """Print all that was seen; whether it is good."""
    for name, seconds in (("first token of a stream", record.first), ("answer", record.whole)):
        ordered = sorted(seconds) or [float("nan")]
        shown = [f"p{p} {1000 * ordered[len(ordered) * p // 100]:.0f} ms" for p in (50, 95, 99)]
        print(f"{name:<24}{', '.join(shown)}, longest {1000 * ordered[-1]:.0f} ms")
    grown = growth(server.memory)
    print(f"answered {len(record.whole)}, cancelled {len(record.cancelled)}")
    print(f"asked again after {server.kills} kills: {len(record.again)}")
    print(f"memory {server.memory[-1] / 2**20:.0f} MiB, {100 * grown:+.2f}% after the warm-up")
    print(f"failed {len(record.failures)}")
    for failure in record.failures[:10]:
        print(f"  {failure}")
    return not record.failures and bool(record.whole) and grown < MOST_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64, help="default: 64")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--kill", action="store_true", help="the server, half way")
    parser.add_argument("--seed", type=int, default=0, help="of all requests; default: 0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(folder)
        server = Server(folder, Path(place) / "log")
        try:
            record = run(
                server, arguments.clients, 60 * arguments.minutes, arguments.kill, arguments.seed
            )
            good = report(record, server)
        finally:
            server.stop()
        print((Path(place) / "log").read_text()[-2000:], end="", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
