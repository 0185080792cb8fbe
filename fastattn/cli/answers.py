"""Shared by the commands that use a model: it from its folder, settings, tokens as text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn import models
from fastattn.cli.demo import pretrained
from fastattn.generation import Engine, Request, Sampling
from fastattn.nn.stored_cache import NAMES
from fastattn.training.optional import require
from fastattn.training.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
# Tokens that are decoded again with each new one, for the spaces and characters that they share.
OVERLAP = 8
HALF = "\ufffd"  # what decoding makes of a part of a character


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")


def check_least(arguments: argparse.Namespace, *names: str) -> None:
    """Raise ValueError where one of these options is given, and below 1."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def existing(folder: str | Path) -> Path:
    """The path of a folder that is there; FileNotFoundError if it is not."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return path


def texts(arguments: argparse.Namespace) -> list[str]:
    """The texts of the command line, or of "-" the lines of stdin that are not blank."""
    given: list[str] = arguments.texts
    if given == ["-"]:
        return [line for line in sys.stdin.read().splitlines() if line.strip()]
    return given


def labels(config: models.EncoderConfig) -> list[str]:
    """The names of a classifier's classes, in the order of their numbers."""
    return list(config.label_names or [f"LABEL_{number}" for number in range(config.n_labels)])


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dtype", choices=NAMES, help="of the keys and values; default: the model's"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-k", type=int, help="draw from the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="draw from the fewest with this probability")
    parser.add_argument("--min-p", type=float, help="as probable as this share of the best")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1, none")
    parser.add_argument("--seed", type=int, help="of the draws")


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """`Engine.submit`'s ``sampling`` and ``seed``."""
    how = Sampling(
        do_sample=arguments.temperature != 0,
        temperature=arguments.temperature or 1.0,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    return {"sampling": how, "seed": arguments.seed}


def load(folder: str | None, arguments: argparse.Namespace, purpose: str) -> tuple[Any, Any]:
    """The model and transformers' tokenizer of a folder; without one, SmolLM2's of its package.

    Raises:
        ImportError: transformers is not installed, or there is no folder and no package.
        OSError, ValueError: the folder holds no model of this package, or a tokenizer that is
            not this model's: it has ids that the model lacks.
    """
    transformers = require("transformers", "hf", purpose)
    path = existing(_smollm2(purpose) if folder is None else folder)
    weights = list(path.glob("*.gguf"))
    gguf: dict[str, Any] = {"gguf_file": weights[0].name} if len(weights) == 1 else {}
    dtype = getattr(torch, arguments.dtype)
    model = models.load(path, dtype=dtype, device=arguments.device, **gguf)
    if not isinstance(model, models.GPT):
        raise ValueError(f"{purpose} takes decoders, and {path} has a {type(model).__name__}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, **gguf)
    # A vocabulary that is larger than the tokenizer's is common: it is rounded up.
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= model.config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has the token {token!r} with the id {last}, and the model a "
            f"vocabulary of {model.config.vocab_size}: give it the tokenizer that it was trained "
            f"with, or call model.resize_token_embeddings({last + 1}) and save it"
        )
    return model, tokenizer


def load_for(arguments: argparse.Namespace, cls: type, purpose: str) -> tuple[Any, Tokenizer]:
    """The model of a class and the tokenizer in `arguments.folder`.

    Raises:
        ImportError: safetensors or tokenizers is not installed.
        OSError, ValueError: the folder holds no such model, or no tokenizer.
    """
    path = existing(arguments.folder)
    model = models.load(path, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    if not isinstance(model, cls):
        raise ValueError(
            f"{purpose} takes the class {cls.__name__}; {path} has one of {type(model).__name__}"
        )
    return model, Tokenizer.load(path)


def _smollm2(purpose: str) -> Path:
    """The folder of SmolLM2-135M-Instruct, where its package is installed."""
    if (hint := pretrained.missing()) is not None:
        raise ImportError(f"{purpose} needs a FOLDER with a model, or SmolLM2: {hint}")
    return pretrained.gguf_file().parent


class TextStream:
    """Tokens to text, piece by piece: no half characters, and nothing from a stop string on.

    Args:
        tokenizer: transformers'.
        stops: texts that end it. Whatever may begin one is held back.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._window: list[int] = []
        self._decoded = ""  # of the window, and given or held
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decode()
        if text.endswith(HALF):
            return ""
        new, self._decoded = text[len(self._decoded) :], text
        if len(self._window) > 4 * OVERLAP:
            self._window = self._window[-OVERLAP:]
            self._decoded = self._decode()
        return self._certain(self._held + new)

    def end(self) -> str:
        """The text that was held back, and half a character as it is."""
        if self.stopped:
            return ""
        text = self._certain(self._held + self._decode()[len(self._decoded) :])
        return text if self.stopped else text + self._held

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(
            self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _certain(self, text: str) -> str:
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class Progress:
    """Tokens a second on stderr: at the end, and meanwhile if the text goes elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty() and not sys.stdout.isatty()
        self._start = self._shown = time.perf_counter()
        self._first: float | None = None

    def token(self, count: int) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        if self._live and now - self._shown > 0.2:
            self._shown = now
            print(f"\r{self._line(count, now)}", end="", file=sys.stderr, flush=True)

    def end(self, count: int, reason: str | None) -> None:
        line = f"{self._line(count, time.perf_counter())} [{reason}]"
        print(f"\r{line}" if self._live else line, file=sys.stderr, flush=True)

    def _line(self, count: int, now: float) -> str:
        first = now if self._first is None else self._first
        rate = (count - 1) / (now - first) if count > 1 and now > first else 0.0
        return (
            f"{count} tokens, the first after {first - self._start:.2f} s, then {rate:.1f} tokens/s"
        )


def write(request: Request, text: TextStream) -> str:
    """Print a request's text as it comes, then its progress line; the text."""
    progress, whole = Progress(), ""
    for token in request:
        progress.token(len(request.tokens))
        whole += _print(text.push(token))
        if text.stopped:
            request.cancel()
    whole += _print(text.end() + "\n")
    progress.end(len(request.tokens), "stop" if text.stopped else request.finish_reason)
    return whole[:-1]


def _print(piece: str) -> str:
    print(piece, end="", flush=True)
    return piece


def engine(model: Any, tokens: int, page_size: int = 16, **options: Any) -> Engine:
    """An engine with room for so many tokens."""
    return Engine(model, pages=-(-tokens // page_size), page_size=page_size, **options)
