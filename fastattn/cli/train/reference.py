"""`fastattn train --help`: every key of a config with its type, its default and its sentence."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from fastattn.training.objectives import OBJECTIVES
from fastattn.training.runs.fields import accepted, is_required, sentences
from fastattn.training.runs.settings import LENGTHS, TABLES, config_class
from fastattn.training.runs.toml import written_value

WIDTH = 96


def reference() -> str:
    """All tables that a config may have."""
    parts: list[str] = []
    for name, cls in TABLES.items():
        parts.append(_table(f"[{name}]", cls))
        if name == "model":
            parts += _configs()
        if name == "data":
            parts += [
                _table(f'[objective] name = "{objective.name}"', objective.settings_class, LENGTHS)
                for objective in OBJECTIVES.values()
            ]
    return "\n\n".join(parts)


def _configs() -> Iterator[str]:
    """The tables of the models' configs, each once, with the objectives that have it."""
    of: dict[Any, list[str]] = {}
    for objective in OBJECTIVES.values():
        of.setdefault(config_class(objective), []).append(objective.name)
    for cls, names in of.items():
        yield _table(f"[model.config] with the objective {', '.join(names)}", cls)


def _table(title: str, cls: Any, lengths: tuple[str, ...] = ()) -> str:
    """One table; the default of fields that are `lengths` is [training]'s context."""
    hints, said = typing.get_type_hints(cls), sentences(cls)
    summary = " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())
    lines = [title, _wrapped(summary, 2)]
    fields = [field for field in dataclasses.fields(cls) if field.name in said]
    # Neighbours that share a sentence are followed by it once.
    for sentence, group in itertools.groupby(fields, lambda field: said[field.name]):
        lines += [f"  {f.name}: {accepted(hints[f.name])}{_default(f, lengths)}" for f in group]
        lines.append(_wrapped(sentence, 6))
    return "\n".join(lines)


def _wrapped(text: str, margin: int) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * margin, subsequent_indent=" " * margin)


def _default(field: dataclasses.Field[Any], lengths: tuple[str, ...]) -> str:
    if field.name in lengths:
        return "; default the context of [training]"
    if is_required(field):
        return "; must be given"
    if field.default_factory is not dataclasses.MISSING:
        return ""
    return f"; default {written_value(field.default)}"
