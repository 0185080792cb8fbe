"""Hypothesis' changes of bytes and of JSON that are whole: what a damaged or hostile file may be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Numbers and texts at which readers break.
NUMBERS = (
    0, 1, -1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**12,
    -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "a", "\0", "\ud800", "../../x", "/etc/passwd", "..", "model.bin", "\ufeff", "今天", "a" * 5000,
    "%s%n", "__import__('os')", "{{ 1 / 0 }}", "<|endoftext|>", "-1", "1e9", "nan", "default", "yarn",
)  # fmt: skip
BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"{",
    b"]",
    b'"',
    b"\\u",
    b"[" * 3000,
    b"\x80\x02.",
    b"PK\x03\x04",
)

values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """`content` with a few bytes flipped, cut, doubled, replaced or put in."""
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.sampled_from((0, 1, 2, 8, 100))))
        new = draw(st.sampled_from(BYTES) | st.binary(max_size=8) | st.just(content[place:end] * 2))
        content = content[:place] + new + content[end:]
        if draw(st.integers(0, 9)) == 0:
            content = content[:place]
    return content


@st.composite
def changed_json(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """`value` with a few of its parts replaced, left out, renamed or put in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(value))
        holder, key = draw(st.sampled_from(places)) if places else ({"a": 0}, "a")
        kind = draw(st.sampled_from(("replace", "replace", "leave out", "rename", "put in")))
        if kind == "leave out":
            holder.pop(key)
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5) | st.sampled_from(TEXTS))] = holder.pop(key)
        elif kind == "put in" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(values)
        else:
            holder[key] = draw(values)
    return value


def text_of(value: Any) -> bytes:
    """JSON, with what Python's writer allows and JSON does not (NaN)."""
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    """(holder, key) of every part of a value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def drawn(cases: st.SearchStrategy[Any], draws: int) -> Callable[[Callable[[Any], Any]], Any]:
    """A decorator: the function without arguments that calls it with so many cases, always these."""
    the_same = settings(
        max_examples=draws, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda check: the_same(given(cases)(check))


MEMORY = 2**28  # beyond what the process has: the readers' libraries want some of their own


def fuzz(
    cases: st.SearchStrategy[Any], draws: int, check: Callable[[Any], Any], memory: int = MEMORY
) -> None:
    """`check` of so many cases in a bounded process: it returns, or raises what is documented."""

    @drawn(cases, draws)
    def draw(case: Any) -> None:
        try:
            check(case)
        except (ValueError, FileNotFoundError) as error:
            assert str(error)

    bounded.run(draw, memory=memory, seconds=60 + draws)
