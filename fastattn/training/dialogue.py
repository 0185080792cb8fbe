"""Conversations as tokens: a tokenizer's chat template, and which tokens are the assistant's.

A template is a program in the language Jinja that comes with a tokenizer. It runs in Jinja's
sandbox. A message cannot forge a turn: where its text has the name of a special token, these
characters become ordinary tokens, while the template's own become the special ones.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from fastattn.training.optional import require
from fastattn.training.tokenizer import Tokenizer, Words

SPEAKERS = ("system", "user", "assistant")
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
# For a tokenizer that has no template: each turn in its own pair of tokens, as in ChatML.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
PRIVATE = range(0xF0000, 0xFFFFE)  # code points that Unicode gives to nobody

Message = dict[str, str]


class Dialogue(NamedTuple):
    """A conversation's tokens.

    Attributes:
        ids: (n,) token ids.
        answer: (n,) boolean: the assistant's, each answer with the token that ends its turn.
    """

    ids: numpy.ndarray
    answer: numpy.ndarray


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Message]) -> Dialogue:
    """The tokens of a conversation, by the tokenizer's chat template.

    An answer is what the template writes for a message of the assistant after the prompt with which
    it asks for one, up to the last special token.

    Args:
        tokenizer: has a `chat_template`.
        messages: each {"role": "system", "user" or "assistant", "content": text}.

    Raises:
        TypeError, ValueError: a message does not fit, the template refuses the messages, or it does
            not write a part of a conversation as it begins the whole.
        ImportError: jinja2 is not installed.
    """
    messages, originals = _escaped(tokenizer, _checked(messages))
    whole = render(tokenizer, messages)
    ids, places, special = _encoded(tokenizer, whole, originals)
    answer: numpy.ndarray = numpy.zeros(len(ids), dtype=bool)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:index], ask=True)
        answered = render(tokenizer, messages[: index + 1])
        if not (answered.startswith(asked) and whole.startswith(answered)):
            raise ValueError(
                f"the chat template writes the messages before and with number {index} differently "
                "when others follow, so that its answer cannot be told from the rest: use a "
                "template that writes each message in one way"
            )
        inside = (places >= len(asked)) & (places < len(answered))
        ends = numpy.flatnonzero(inside & special)
        if not len(ends):
            raise ValueError("the chat template does not end an answer with a special token")
        inside[ends[-1] + 1 :] = False  # the line break after it is nobody's
        answer |= inside
    return Dialogue(ids, answer)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the assistant's next answer begins.

    Arguments and errors are those of `encode_dialogue`.
    """
    messages, originals = _escaped(tokenizer, _checked(messages))
    ids, _, _ = _encoded(tokenizer, render(tokenizer, messages, ask=True), originals)
    return ids.tolist()


def render(tokenizer: Tokenizer, messages: Sequence[Message], ask: bool = False) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
        ask: whether the beginning of an answer follows.

    Raises:
        ValueError: there is no template, or it refuses the messages.
        ImportError: jinja2 is not installed.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: set its attribute chat_template, to "
            "fastattn.training.dialogue.TEMPLATE for instance"
        )
    tokens = {f"{role}_token": token for role, token in tokenizer.roles.items()}
    try:
        text: str = _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=ask, **tokens
        )
    except ImportError:
        raise
    except Exception as error:  # a template's own, or of the code that runs it
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text


def _checked(messages: Sequence[Message]) -> list[Message]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"messages must be a list of messages that is not empty, got {messages!r}")
    for index, message in enumerate(messages):
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
        )
        if not isinstance(content, str) or role not in SPEAKERS:
            raise ValueError(
                f'messages[{index}] must be {{"role": ..., "content": text}}, the role one of '
                f"{', '.join(SPEAKERS)}; got {message!r}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _escaped(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[Message], dict[str, str]]:
    """The messages with a private character for each special token's name, and these names."""
    used = set("".join(message["content"] for message in messages))
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    marks: dict[str, str] = {}  # by name
    escaped = []
    for message in messages:
        content = message["content"]
        words = tokenizer.words(content)
        pieces, end = [], 0
        for first, last in words.offsets[_special(tokenizer, content, words)].tolist():
            name = content[first:last]
            if name not in marks:
                marks[name] = next(free)
            pieces += [content[end:first], marks[name]]
            end = last
        escaped.append({**message, "content": "".join([*pieces, content[end:]])})
    return escaped, {mark: name for name, mark in marks.items()}


def _encoded(
    tokenizer: Tokenizer, text: str, originals: dict[str, str]
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """A rendered text's tokens, where in it each begins, and which are special: (n,) each."""
    parts: list[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]] = []
    begin = 0
    pattern = "([" + "".join(originals) + "])" if originals else "(?!)"
    for piece in re.split(pattern, text):
        name = originals.get(piece, piece)
        words = tokenizer.words(name, literal=piece in originals)
        special = _special(tokenizer, name, words)
        if piece in originals and special.any():
            raise ValueError(
                f"a message has the text {name!r}, which this tokenizer can write as a special "
                "token only: take it out of the message"
            )
        places: numpy.ndarray = words.offsets[:, 0]
        if piece in originals:
            places = numpy.zeros_like(places)  # a mark is one character
        parts.append((words.ids, begin + places, special))
        begin += len(piece)
    whole = [numpy.concatenate(arrays) for arrays in zip(*parts)]
    return whole[0], whole[1], whole[2]


def _special(tokenizer: Tokenizer, text: str, words: Words) -> numpy.ndarray:
    """(n,) which tokens are special ones; what the tokenizer does not know is not for that one."""
    special: numpy.ndarray = numpy.isin(words.ids, list(tokenizer.special_ids))
    if "unk" in tokenizer.roles:
        for index in numpy.flatnonzero(words.ids == tokenizer.token("unk")):
            first, last = words.offsets[index]
            special[index] = text[first:last] == tokenizer.roles["unk"]
    return special


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    sandbox = require("jinja2.sandbox", "train", "a chat template")

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # The names that templates written for transformers use. The time of day is not among them:
    # the same conversation has the same tokens on each day.
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template)
