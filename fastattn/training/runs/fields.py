"""A dataclass by its fields: a plain table turned into one, and the sentence that documents each.

    filled(TrainingConfig, {"steps": 1000, "learning_rate": 1}, "training")

Types are strict, conversions only those that lose nothing: an integer where a number is wanted, a
whole number where an integer is (1e6), an array for a tuple, and the text "none" for None, which
TOML has not.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

Made = TypeVar("Made")

NONE = "none"
_MISFIT = object()


class FieldError(ValueError):
    """A table that does not fit its dataclass."""


def filled(
    cls: type[Made],
    table: Mapping[str, Any],
    where: str,
    elsewhere: Mapping[str, Sequence[str]] | None = None,
) -> Made:
    """The dataclass `cls` made of a table.

    Args:
        where: the table's name, for errors.
        elsewhere: the keys of other tables, among which the error of an unknown one looks too.

    Raises:
        ValueError: a key that `cls` lacks, a value of another type, a field that must be given and
            is not, or whatever `cls` itself raises; the message names table and key.
    """
    values = converted(cls, table, where, elsewhere)
    absent = [
        field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if is_required(field) and field.name not in values
    ]
    if absent:
        raise FieldError(f"[{where}] needs {' and '.join(absent)}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise FieldError(f"[{where}] {error}") from error


def converted(
    cls: type,
    table: Mapping[str, Any],
    where: str,
    elsewhere: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The table's values as the fields of `cls` have them; arguments and errors as `filled`'s."""
    hints = typing.get_type_hints(cls)
    known = names(cls)
    values = {}
    for key, value in table.items():
        if key not in known:
            raise FieldError(f"[{where}] has no key {key!r}{_meant(key, known, elsewhere or {})}")
        fitting = _converted(value, hints[key])
        if fitting is _MISFIT:
            raise FieldError(
                f"[{where}] {key} must be {accepted(hints[key])}, got {value!r}"
                f"{_hint(value, hints[key])}"
            )
        values[key] = fitting
    return values


def names(cls: Any) -> list[str]:
    """The fields of a dataclass."""
    return [field.name for field in dataclasses.fields(cls)]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that was probably meant, if any."""
    close = difflib.get_close_matches(word, known, 1)
    return close[0] if close else None


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether the field has no default."""
    return field.default is field.default_factory is dataclasses.MISSING


def sentences(cls: type) -> dict[str, str]:
    """The sentence on each field in the "Attributes:" of a dataclass's docstring.

    An entry is "name: text" or "name, name: text"; its further lines are indented deeper.
    """
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    said: dict[str, str] = {}
    for entry in _entries(block):
        if match := re.match(r"(\w+(?:, \w+)*): (.+)", entry):
            said |= dict.fromkeys(match[1].split(", "), match[2])
    return said


def accepted(hint: Any) -> str:
    """The values that a type hint accepts, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return "a value"
    if origin in (Union, types.UnionType):
        return " or ".join(accepted(argument) for argument in arguments)
    if origin is Literal:
        *others, last = (f'"{argument}"' for argument in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"an array of {_PLURALS.get(arguments[0], 'values')}"
        return f"an array of {len(arguments)} {_PLURALS.get(arguments[0], 'values')}"
    if origin is not None and issubclass(origin, Mapping):
        return "a table"
    return _SINGULARS[hint]


_SINGULARS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): f'"{NONE}"',
}
_PLURALS = {int: "integers", float: "numbers", str: "strings"}


def _meant(key: str, known: Sequence[str], elsewhere: Mapping[str, Sequence[str]]) -> str:
    """How the error of an unknown key goes on: by the nearest one, here or in another table."""
    for table, others in elsewhere.items():
        if key in others:
            return f": it is one of [{table}]"
    if close := nearest(key, known):
        return f": did you mean {close!r}?"
    for table, others in elsewhere.items():
        if close := nearest(key, others):
            return f": did you mean {close!r} of [{table}]?"
    return f"; its keys are {', '.join(known)}" if known else ": it has none"


def _converted(value: Any, hint: Any) -> Any:
    """`value` for a field of this type, or _MISFIT."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value == NONE and type(None) in arguments:
            return None
        fitting = (_converted(value, argument) for argument in arguments)
        return next((one for one in fitting if one is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if value in arguments else _MISFIT
    if origin is tuple:
        return _array(value, arguments)
    if origin is not None and issubclass(origin, Mapping):
        return dict(value) if isinstance(value, Mapping) else _MISFIT
    if hint is Any or type(value) is hint:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return _MISFIT


def _array(value: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        return _MISFIT
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        return _MISFIT
    parts = tuple(_converted(one, argument) for one, argument in zip(value, arguments))
    return _MISFIT if _MISFIT in parts else parts


def _hint(value: Any, hint: Any) -> str:
    """How to write the value that was probably meant."""
    if isinstance(value, (bool, int, float)) and "a string" in accepted(hint):
        return f': write "{str(value).lower() if isinstance(value, bool) else value}" in quotes'
    return ""


def _entries(block: str) -> list[str]:
    """The entries of a docstring's block, each in one line, up to the block's end."""
    lines = list(itertools.takewhile(str.strip, block.splitlines()))
    entries: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line[0].isspace() and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line)
    return entries
