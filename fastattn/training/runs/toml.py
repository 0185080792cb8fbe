"""TOML: files, single values of a command line, and plain tables written back."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.files import check_depth, local_path, read_whole
from fastattn.training.optional import require
from fastattn.training.runs.fields import NONE

KEY = re.compile(r"[\w-]+(\.[\w-]+)*")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no TOML; the message says where.
    """
    file = local_path("config", path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no config file {file}")
    try:
        # A byte order mark is an editor's habit and no part of the text.
        return parsed(read_whole(file).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def overridden(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tables with overrides of a command line, "training.steps=100", in their order.

    A value is TOML's; what is none and has no quote or bracket is a text, so that a shell's quotes
    suffice.

    Raises:
        ValueError: an override that is none, or a key inside something that is no table.
    """
    result = _copied(tables)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ValueError(
                f"an override must be table.key=value, as training.steps=100; got {override!r}"
            )
        *parents, last = key.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ValueError(f"{override!r}: {parent!r} is no table")
        table[last] = _value(override, text)
    return result


def written(tables: Mapping[str, Any]) -> str:
    """The TOML of tables of tables, whose values are texts, numbers, truths, arrays or tables.

    None is the text "none".
    """
    lines: list[str] = []
    for name, table in tables.items():
        lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
        lines += [f"{_key(key)} = {written_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def parsed(text: str) -> dict[str, Any]:
    """The tables of a text in TOML.

    Raises:
        ValueError: it is none; the message says where.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = require("tomli", "train", "a config in TOML on Python 3.10")
    try:
        tables: dict[str, Any] = tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(tables)
    return tables


def _value(override: str, text: str) -> Any:
    try:
        tables = parsed(f"value = {text}")
    except ValueError as error:
        if re.search(r"""["'\[\]{}\n]""", text):
            raise ValueError(f"{override!r} has no value of TOML: {error}") from error
        return text
    if tables.keys() != {"value"}:
        raise ValueError(f"{override!r} has more than a value")
    return tables["value"]


def _copied(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose tables may be changed."""
    return {
        key: _copied(value) if isinstance(value, Mapping) else value
        for key, value in tables.items()
    }


def written_value(value: Any) -> str:
    """A value as TOML writes it; None is the text "none"."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # inf and nan are TOML's words too
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {written_value(one)}" for key, one in value.items())
        return f"{{{pairs}}}"
    return f"[{', '.join(map(written_value, value))}]"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    """A basic string: quotes, backslashes and control characters are escaped."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        return "\\" + character if character in '"\\' else f"\\u{ord(character):04x}"

    return '"' + re.sub(r'["\\\x00-\x1f\x7f]', escaped, text) + '"'
