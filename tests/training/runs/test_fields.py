"""Tables to dataclasses: strict types, safe conversions, errors that name the key and its table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fastattn.training.runs.fields import FieldError, accepted, converted, filled, sentences


@dataclass(frozen=True)
class Settings:
    """Settings of a test.

    Attributes:
        count: how many,
            of whatever.
        rate, share: two numbers.
        name: a text: with a colon.

    Raises:
        ValueError: count is negative.
    """

    count: int
    rate: float = 0.5
    share: float | None = None
    name: str = "x"
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    files: str | tuple[str, ...] = ()
    ends: int | tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must be at least 0, got {self.count}")


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("count", 3, 3),
        ("count", 1e6, 1_000_000),
        ("rate", 1, 1.0),
        ("rate", math.inf, math.inf),
        ("share", "none", None),
        ("share", 2, 2.0),
        ("name", "none", "none"),  # only where None is accepted
        ("flag", True, True),
        ("kind", "b", "b"),
        ("pair", [1, 2.5], (1.0, 2.5)),
        ("files", "a", "a"),
        ("files", ["a", "b"], ("a", "b")),
        ("ends", [1, 2.0], (1, 2)),
        ("ends", 7, 7),
        ("extra", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_that_fit(key: str, given: Any, expected: Any) -> None:
    value = converted(Settings, {key: given}, "test")[key]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("count", 1.5, "must be an integer, got 1.5"),
        ("count", True, "must be an integer, got True"),
        ("count", "3", "must be an integer, got '3'"),
        ("count", "none", "must be an integer, got 'none'"),
        ("rate", True, "must be a number, got True"),
        ("share", "x", "must be a number or \"none\", got 'x'"),
        ("name", 3, 'must be a string, got 3: write "3" in quotes'),
        ("name", True, 'must be a string, got True: write "true" in quotes'),
        ("flag", 1, "must be true or false, got 1"),
        ("kind", "c", 'must be "a" or "b", got \'c\''),
        ("pair", [1], r"must be an array of 2 numbers, got \[1\]"),
        ("pair", [1, "x"], "must be an array of 2 numbers"),
        ("files", [1], "must be a string or an array of strings"),
        ("ends", [True], 'must be an integer or an array of integers or "none"'),
        ("extra", [1], "must be a table"),
    ],
)
def test_values_that_do_not(key: str, given: Any, message: str) -> None:
    with pytest.raises(FieldError, match=rf"^\[test\] {key} {message}"):
        converted(Settings, {key: given}, "test")


def test_unknown_keys() -> None:
    elsewhere = {"other": ["steps", "width"]}
    for key, message in {
        "cuont": "no key 'cuont': did you mean 'count'",
        "width": r"no key 'width': it is one of \[other\]",
        "widht": r"no key 'widht': did you mean 'width' of \[other\]",
        "qqq": "no key 'qqq'; its keys are count, rate, share, name",
    }.items():
        with pytest.raises(FieldError, match=message):
            filled(Settings, {"count": 1, key: 1}, "test", elsewhere)


def test_errors_of_the_class_name_the_table() -> None:
    with pytest.raises(FieldError, match=r"^\[test\] count must be at least 0, got -1"):
        filled(Settings, {"count": -1}, "test")
    with pytest.raises(FieldError, match=r"^\[test\] needs count"):
        filled(Settings, {}, "test")


def test_sentences() -> None:
    assert sentences(Settings) == {
        "count": "how many, of whatever.",
        "rate": "two numbers.",
        "share": "two numbers.",
        "name": "a text: with a colon.",
    }
    assert sentences(int) == {}


def test_three_words_have_commas() -> None:
    assert accepted(Literal["a", "b", "c"]) == '"a", "b" or "c"'
