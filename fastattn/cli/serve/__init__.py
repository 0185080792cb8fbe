"""Serve a model by OpenAI's interface, with a chat page.

    pip install "fastattn[serve]"
    fastattn serve FOLDER                          http://127.0.0.1:8000, /v1/chat/completions ...
    fastattn serve                                 SmolLM2, where it is installed (fastattn chat)
    fastattn serve FOLDER --port 8080 --pages 4096 --max-batch 128
    FASTATTN_API_KEY=... fastattn serve FOLDER --host 0.0.0.0

Any number of requests are continued together (`fastattn.generation.Engine`), in a memory of
--pages pages of --page-size tokens; what no page is left for waits, up to --max-choices. It listens
on this machine only unless --host says otherwise, which takes a key that clients must send.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from pathlib import Path

from fastattn.cli import answers
from fastattn.generation import Background, Engine
from fastattn.training.optional import require

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
KEY = "FASTATTN_API_KEY"
SHORTEST_KEY = 16
MOST_CONNECTIONS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", help="with the model and its tokenizer")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument("--name", help="the model's name for clients; default: the folder's")
    parser.add_argument("--pages", type=int, default=1024, help="of the cache; default: 1024")
    parser.add_argument("--page-size", type=int, default=16, help="tokens; default: 16")
    parser.add_argument("--max-batch", type=int, default=32, help="requests at once; default: 32")
    parser.add_argument(
        "--prefill-chunk", type=int, default=512, help="prompt tokens a step; default: 512"
    )
    guard = parser.add_argument_group("limits")
    guard.add_argument(
        "--api-key", metavar="KEY", help=f"that clients must send; better in ${KEY}, unseen by ps"
    )
    guard.add_argument("--no-key", action="store_true", help="on another --host, for everyone")
    guard.add_argument("--rate", type=int, help="requests a minute of a client; default: any")
    guard.add_argument(
        "--max-choices", type=int, default=256, help="that run or wait; default: 256, then 429"
    )
    guard.add_argument("--max-new-tokens", type=int, help="of a choice; default: what has room")
    answers.add_model(parser)
    answers.add_cache(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    for package in ("starlette", "uvicorn"):
        require(package, "serve", "fastattn serve")
    import uvicorn

    from fastattn.cli.serve.app import make_app
    from fastattn.cli.serve.guard import Impatient
    from fastattn.cli.serve.running import Admission

    answers.check_least(arguments, "rate", "max_choices", "max_new_tokens")
    key, here = _key(arguments), _is_loopback(arguments.host)
    listener = _listen(arguments.host, arguments.port)  # before the model is read
    with listener:
        model, tokenizer = answers.load(arguments.folder, arguments, "fastattn serve")
        engine = Engine(
            model,
            pages=arguments.pages,
            page_size=arguments.page_size,
            max_batch=arguments.max_batch,
            prefill_chunk=arguments.prefill_chunk,
            cache_dtype=arguments.cache_dtype,
        )
        name = arguments.name or Path(arguments.folder or "SmolLM2-135M-Instruct").resolve().name
        hosts = [*LOOPBACK, arguments.host] if here else None
        admission = Admission(arguments.max_choices, arguments.max_new_tokens)
        with Background(engine) as running:
            app = make_app(
                running, tokenizer, name, hosts, key=key, rate=arguments.rate, admission=admission
            )
            host, port = listener.getsockname()[:2]
            print(f"{name}: http://{host}:{port}/ is the chat, /v1 the interface", flush=True)
            config = uvicorn.Config(
                app,
                http=Impatient,
                ws="none",
                limit_concurrency=MOST_CONNECTIONS,
                proxy_headers=False,  # anyone could write them
                server_header=False,
                log_level="warning",
                timeout_graceful_shutdown=3,
            )
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def _key(arguments: argparse.Namespace) -> str | None:
    """The key, from the command line or the environment; no error repeats it."""
    key: str | None = arguments.api_key or os.environ.get(KEY) or None
    if key is None:
        if not (_is_loopback(arguments.host) or arguments.no_key):
            raise ValueError(
                f"--host {arguments.host} lets other machines in: set {KEY} to a key that they "
                "must send, or give --no-key to let in everyone"
            )
    elif len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"the key must have at least {SHORTEST_KEY} printable ASCII characters without spaces: "
            "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return key


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name but "localhost" may be anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}; got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or "
            "--host"
        ) from error
