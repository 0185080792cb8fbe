"""OpenAI's completions and chat completions: bodies of requests, checked, and of responses."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastattn.cli.chat import prompt_ids
from fastattn.generation import Sampling

# What a completion has unless it says otherwise; a chat goes on to the end of the context.
MAX_TOKENS = 16
MOST_CHOICES = 64
MOST_STOPS = 4

Check = Callable[[Any], bool]


class RequestError(Exception):
    """What is wrong with a request, as a response of ``status``."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": error}


@dataclasses.dataclass(frozen=True)
class Task:
    """A request's body, checked.

    Attributes:
        prompts: token ids.
        max_tokens: new ones of each; None: as many as there is room for.
        n: choices of each prompt.
        sampling, seed: of the first choice; the next one's seed is one more.
        stop: texts that end a choice.
        stream, usage: send the text as it comes; and the counts at the end.
    """

    chat: bool
    prompts: list[list[int]]
    max_tokens: int | None
    n: int
    sampling: Sampling
    seed: int | None
    stop: list[str]
    stream: bool
    usage: bool


def _integer(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _texts(value: Any) -> bool:
    several = [value] if isinstance(value, str) else value
    return isinstance(several, list) and all(isinstance(text, str) and text for text in several)


def _prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if all(map(_integer, value)) or all(isinstance(text, str) for text in value):
        return True
    return all(isinstance(ids, list) and ids and all(map(_integer, ids)) for ids in value)


def _messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    )


# Each parameter's check, and what it must be.
SAMPLING: dict[str, tuple[Check, str]] = {
    "temperature": (_number, "a number; 0 is greedy"),
    "top_p": (_number, "a number"),
    "top_k": (_integer, "an integer"),
    "repetition_penalty": (_number, "a number"),
}
COMMON: dict[str, tuple[Check, str]] = {
    "model": (lambda value: isinstance(value, str), "a string"),
    "max_tokens": (_integer, "an integer"),
    "n": (lambda value: _integer(value) and 1 <= value <= MOST_CHOICES, f"1 to {MOST_CHOICES}"),
    "seed": (lambda value: _integer(value) and -(2**63) <= value < 2**63, "a 64-bit integer"),
    "stop": (
        lambda value: _texts(value) and (isinstance(value, str) or len(value) <= MOST_STOPS),
        f"a text or at most {MOST_STOPS}, none of them empty",
    ),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (
        lambda value: isinstance(value, dict) and value.keys() <= {"include_usage"},
        '{"include_usage": true or false}',
    ),
    "user": (lambda value: isinstance(value, str), "a string"),  # has no effect
    **SAMPLING,
}
COMPLETION = {"prompt": (_prompt, "a text, token ids, or a list of these"), **COMMON}
CHAT = {
    "messages": (_messages, "a list of objects with a role and a content"),
    "max_completion_tokens": (_integer, "an integer"),
    **COMMON,
}


def read(body: Any, tokenizer: Any, chat: bool) -> Task:
    """The task that a request's JSON asks for. Raises RequestError, naming the parameter."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    known = CHAT if chat else COMPLETION
    for name in body.keys() - known.keys():
        raise RequestError(
            f"unknown parameter {name!r}; this server knows {', '.join(sorted(known))}", name
        )
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        check, what = known[name]
        if not check(value):
            raise RequestError(f"{name} must be {what}; got {_short(value)}", name)
    needed = "messages" if chat else "prompt"
    if needed not in given:
        raise RequestError(f"{needed} is missing", needed)
    max_tokens = given.get("max_completion_tokens", given.get("max_tokens"))
    if max_tokens is None and not chat:
        max_tokens = MAX_TOKENS
    stop = given.get("stop", [])
    sampling = _sampling(given)
    return Task(
        chat=chat,
        prompts=[_chat(given["messages"], tokenizer)] if chat else _ids(given["prompt"], tokenizer),
        max_tokens=max_tokens,
        n=given.get("n", 1),
        sampling=sampling,
        seed=given.get("seed") if sampling.do_sample else None,
        stop=[stop] if isinstance(stop, str) else stop,
        stream=given.get("stream", False),
        usage=given.get("stream_options", {}).get("include_usage", False),
    )


def _sampling(given: dict[str, Any]) -> Sampling:
    fields = {name: given[name] for name in SAMPLING if name in given}
    draws = fields.get("temperature") != 0
    try:
        drawn = Sampling(
            do_sample=True, **{**fields, "temperature": fields.get("temperature") or 1}
        )
    except (TypeError, ValueError) as error:
        named = next((name for name in fields if str(error).startswith(name)), None)
        raise RequestError(str(error), named) from error
    return drawn if draws else Sampling(repetition_penalty=drawn.repetition_penalty)


def _ids(prompt: Any, tokenizer: Any) -> list[list[int]]:
    if isinstance(prompt, str) or _integer(prompt[0]):
        prompt = [prompt]
    return [tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in prompt]


def _chat(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    plain = [{**message, "content": _content(message.get("content"))} for message in messages]
    try:
        return prompt_ids(plain, tokenizer)
    except ValueError as error:
        raise RequestError(str(error), "messages") from error


def _content(content: Any) -> str:
    """A message's text, of a string or of parts of type "text"."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError("each message must have a content, a text", "messages")
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError('a message\'s parts must be of type "text"', "messages")
    return "".join(part["text"] for part in parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Responses:
    """The bodies of a task's responses: the whole, or one for each piece."""

    def __init__(self, task: Task, model: str) -> None:
        self._chat = task.chat
        kind = "chat.completion" if task.chat else "text_completion"
        chunk = ".chunk" if task.chat and task.stream else ""
        self._head = {
            "id": f"{'chatcmpl' if task.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + chunk,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """``texts``: each choice's, and why it ended."""
        choices = [
            {"index": index, "finish_reason": reason, "logprobs": None}
            | (
                {"message": {"role": "assistant", "content": text}}
                if self._chat
                else {"text": text}
            )
            for index, (text, reason) in enumerate(texts)
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def piece(self, index: int, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """The next text of a choice; None: its beginning, or its end if there is a ``reason``."""
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if not self._chat:
            choice["text"] = text or ""
        elif text is not None:
            choice["delta"] = {"content": text}
        else:
            choice["delta"] = {} if reason else {"role": "assistant", "content": ""}
        return {**self._head, "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last of a stream that counts."""
        return {**self._head, "choices": [], "usage": usage}
