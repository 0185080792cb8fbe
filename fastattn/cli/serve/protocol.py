"""OpenAI's completions and chat completions: a request's body, checked, and those of responses."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from fastattn.cli.chat import prompt_ids
from fastattn.generation import Sampling

MAX_TOKENS = 16  # of a completion that says nothing; a chat goes on to the end of the context
MOST_CHOICES = 64
MOST_STOPS = 4

# The parameters, and the JSON types that each may have.
SHAPING: dict[str, tuple[type, ...]] = {
    "temperature": (float,), "top_p": (float,), "top_k": (int,), "min_p": (float,),
}  # fmt: skip
SAMPLING: dict[str, tuple[type, ...]] = {
    **SHAPING, "repetition_penalty": (float,), "presence_penalty": (float,),
    "frequency_penalty": (float,),
}  # fmt: skip
# Beyond these a finite logit may become an infinite one, and the step of all requests fails.
RANGES = {
    "temperature": (0.01, 100), "repetition_penalty": (0.01, 100), "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}  # fmt: skip
COMMON: dict[str, tuple[type, ...]] = {
    "model": (str,), "max_tokens": (int,), "n": (int,), "seed": (int,), "stop": (str, list),
    "stream": (bool,), "stream_options": (dict,), "user": (str,), **SAMPLING,
}  # fmt: skip
COMPLETION = {"prompt": (str, list), **COMMON}
CHAT = {"messages": (list,), "max_completion_tokens": (int,), **COMMON}
TYPES = {
    str: "a text", list: "a list", int: "an integer", float: "a number", bool: "true or false",
    dict: "an object",
}  # fmt: skip


class RequestError(Exception):
    """What is wrong with a request, as a response of ``status``."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def too_many(cls, message: str, seconds: int) -> RequestError:
        """429, and after how many seconds to try again."""
        headers = {"Retry-After": str(seconds)}
        text = f"{message}: try again in {seconds} s"
        return cls(text, status=429, code="rate_limit_exceeded", headers=headers)


@dataclasses.dataclass(frozen=True)
class Task:
    """A request's body, checked.

    Attributes:
        prompts: token ids.
        max_tokens: new ones of each; None: as many as there is room for.
        n: choices of each prompt; the seed of the next one is one more.
        stop: texts that end a choice.
        stream, usage: send the text as it comes; and the counts of tokens at the end.
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


def read(body: Any, tokenizer: Any, chat: bool) -> Task:
    """The task that a request's JSON asks for. Raises RequestError, naming the parameter."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    known, needed = (CHAT, "messages") if chat else (COMPLETION, "prompt")
    for name in body.keys() - known.keys():
        names = ", ".join(sorted(known))
        raise RequestError(f"unknown parameter {name!r}; this server knows {names}", name)
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        types = known[name] + ((int,) if float in known[name] else ())
        if type(value) not in types:
            _refuse(name, " or ".join(TYPES[kind] for kind in known[name]), value)
    if not given.get(needed):
        raise RequestError(f"{needed} is missing, or empty", needed)
    stop, n = given.get("stop", []), given.get("n", 1)
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MOST_STOPS or not all(isinstance(text, str) and text for text in stop):
        _refuse("stop", f"a text or at most {MOST_STOPS}, none of them empty", stop)
    if not 1 <= n <= MOST_CHOICES:
        _refuse("n", f"from 1 to {MOST_CHOICES}", n)
    if not -(2**63) <= given.get("seed", 0) < 2**63:
        _refuse("seed", "a 64-bit integer", given["seed"])
    sampling = _sampling(given)
    prompts = [] if chat else _prompts(given["prompt"])
    if len(prompts) * n > MOST_CHOICES:
        message = f"prompt has {len(prompts)} prompts: with n = {n} that is more than"
        raise RequestError(f"{message} {MOST_CHOICES} choices", "prompt")
    return Task(
        chat=chat,
        prompts=[_chat(given["messages"], tokenizer)]
        if chat
        else [tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in prompts],
        max_tokens=given.get(
            "max_completion_tokens", given.get("max_tokens", None if chat else MAX_TOKENS)
        ),
        n=n,
        sampling=sampling,
        seed=given.get("seed") if sampling.do_sample else None,
        stop=stop,
        stream=given.get("stream", False),
        usage=bool(given.get("stream_options", {}).get("include_usage")),
    )


def _refuse(name: str, what: str, value: Any) -> None:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    raise RequestError(f"{name} must be {what}; got {text}", name)


def _sampling(given: dict[str, Any]) -> Sampling:
    """A temperature of 0 is greedy: what shapes the distribution then has no effect."""
    fields = {name: given[name] for name in SAMPLING if name in given}
    try:
        drawn = Sampling(True, **{**fields, "temperature": fields.get("temperature") or 1})
    except (TypeError, ValueError) as error:
        named = next((name for name in fields if str(error).startswith(name)), None)
        raise RequestError(str(error), named) from error
    for name, (least, most) in RANGES.items():
        if fields.get(name) and not least <= fields[name] <= most:
            _refuse(name, f"0, or from {least} to {most}", fields[name])
    if fields.get("temperature") != 0:
        return drawn
    return Sampling(**{name: value for name, value in fields.items() if name not in SHAPING})


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts in a text or token ids, or in a list of these."""
    if isinstance(prompt, str) or type(prompt[0]) is int:
        prompt = [prompt]
    if not all(isinstance(one, (str, list)) for one in prompt):
        _refuse("prompt", "a text, token ids, or a list of these", prompt)
    return list(prompt)


def _chat(messages: list[Any], tokenizer: Any) -> list[int]:
    if not all(isinstance(message, dict) for message in messages):
        _refuse("messages", "objects with a role and a content", messages)
    plain = [{**message, "content": _content(message.get("content"))} for message in messages]
    try:
        return prompt_ids(plain, tokenizer)
    except ValueError as error:
        raise RequestError(str(error), "messages") from error


def _content(content: Any) -> str:
    """A message's text, given as a string or as parts of type "text"."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = parts if isinstance(parts, list) else [parts]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RequestError(
            'a message\'s content must be a text, or parts of type "text"', "messages"
        )
    return "".join(map(str, texts))


class Responses:
    """The bodies of a task's responses: the whole, or one for each piece."""

    def __init__(self, task: Task, model: str) -> None:
        self._chat = task.chat
        kind = "chat.completion" if task.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if task.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if task.chat and task.stream else kind,
            "created": int(time.time()),
            "model": model,
        }

    def body(self, choices: list[dict[str, Any]], **usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **usage}

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """All of a choice, and why it ended."""
        message = {"message": {"role": "assistant", "content": text}}
        return self._choice(index, message if self._chat else {"text": text}, reason)

    def piece(self, index: int, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """The next text of a choice; None: its beginning, or its end if there is a ``reason``."""
        delta: dict[str, str] = {"content": text} if text is not None else {}
        if text is None and reason is None:
            delta = {"role": "assistant", "content": ""}
        content = {"delta": delta} if self._chat else {"text": text or ""}
        return self._choice(index, content, reason)

    def _choice(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, "finish_reason": reason, "logprobs": None, **content}
