"""Serve a model by OpenAI's interface, with a chat page.

    pip install "fastattn[serve]"
    fastattn serve FOLDER                          http://127.0.0.1:8000, /v1/chat/completions ...
    fastattn serve                                 SmolLM2, where it is installed (fastattn chat)
    fastattn serve FOLDER --port 8080 --pages 4096 --max-batch 128

Any number of requests are continued together (`fastattn.generation.Engine`), in a memory of
--pages pages of --page-size tokens; what no page is left for waits. It listens on this machine only
unless --host says otherwise, and asks for no key: put a proxy that does before it.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from fastattn.cli import answers
from fastattn.generation import Background, Engine
from fastattn.training.optional import require

LOOPBACK = ("127.0.0.1", "localhost")


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
    answers.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    for package in ("starlette", "uvicorn"):
        require(package, "serve", "fastattn serve")
    import uvicorn

    from fastattn.cli.serve.app import make_app

    listener = _listen(arguments.host, arguments.port)  # before the model is read
    with listener:
        model, tokenizer = answers.load(arguments.folder, arguments, "fastattn serve")
        engine = Engine(
            model,
            pages=arguments.pages,
            page_size=arguments.page_size,
            max_batch=arguments.max_batch,
            prefill_chunk=arguments.prefill_chunk,
        )
        name = arguments.name or Path(arguments.folder or "SmolLM2-135M-Instruct").resolve().name
        hosts = [*LOOPBACK] if arguments.host in LOOPBACK else ["*"]
        with Background(engine) as running:
            app = make_app(running, tokenizer, name, hosts)
            host, port = listener.getsockname()[:2]
            print(f"{name}: http://{host}:{port}/ is the chat, /v1 the interface", flush=True)
            settings = {"log_level": "warning", "timeout_graceful_shutdown": 3}
            uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[listener])
    return 0


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
